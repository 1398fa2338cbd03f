"""What a run found: frozen records that `results.json` holds and the report draws (schema version 3)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sparq.errors import SparqError
from sparq.report.traces import AttentionMap, HiddenMap, TrainingCurve

SCHEMA_VERSION = 3

FULL = "full"
"""The precision label of the row that others are compared with."""

FRAMEWORKS = ("vanilla", "softmax1", "max_shift")
"""The order of frameworks in tables; others follow in order of appearance."""

PRECISIONS = (FULL, "w8a8-rtn", "w8a8-smoothquant", "w4a4-rtn", "w4a4-smoothquant")
"""The order of precisions in tables; others follow in order of appearance."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Attributes:
        value: the perplexity; may be infinite.
        tokens: number of predicted tokens, the denominator of the mean.
        utterances: number of sequences that the tokens came from.
        split: name of the data, e.g. `test`.
    """

    value: float
    tokens: int
    utterances: int
    split: str


@dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """100 * (substitutions + deletions + insertions) / reference length, in percent; it can pass 100.

    Attributes:
        value: the rate in percent.
        errors: substitutions, deletions and insertions, summed over utterances before the division.
        length: reference length: words for WER, characters for CER, units for the TTS unit error rate.
        utterances: number of utterances.
        split: name of the data, e.g. `test`.
        low: lower end of the 95 % bootstrap interval over utterances; None where there is none.
        high: its upper end.
    """

    value: float
    errors: int
    length: int
    utterances: int
    split: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One utterance's reference text and what the model heard."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True, kw_only=True)
class AsrSplit:
    """Recognition on one test split: `wer` is 100 * `errors` / `words`, with `low` and `high` as in `ErrorRate`."""

    wer: float
    words: int
    utterances: int
    errors: int
    low: float | None = None
    high: float | None = None
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerOutliers:
    """The outlier figures of one decoder layer (0 is the first)."""

    layer: int
    max_inf_norm: float
    kurtosis: float
    attention_mass: float | None = None
    first_token_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOutliers:
    """The outlier figures of the sequences of one task (SpARQ figure 3), over `tokens` tokens."""

    max_inf_norm: float
    mean_kurtosis: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How far activations stick out (SpARQ section 4, "outlier removal").

    Attributes:
        max_inf_norm: largest absolute value of any layer output.
        mean_kurtosis: mean over layers of the kurtosis of the layer output; 3 for a normal distribution.
        attention_mass: mean sum of a row of attention probabilities; 1 for the vanilla softmax.
        first_token_share: mean probability that a row gives to the first token, the usual attention sink.
        sink_rate: share of all attention that goes to tokens which take more than 0.3 of a head's.
        attention_entropy: mean entropy in nats of a row of attention divided by its mass.
        max_logit: largest scaled query-key product.
        first_value_norm: mean Euclidean norm of the first token's value, over heads and sequences.
        sink_value_norm: the same of tokens that take more than 0.3 of a head's attention; None without any.
        other_value_norm: the same of all other tokens.
        tokens: number of tokens measured.
        final_norm_max_inf_norm: the same as `max_inf_norm` after the final norm, which would hide the others.
        per_layer: the figures of each layer.
        by_task: the figures of each task's sequences, where tasks were measured apart.
    """

    max_inf_norm: float
    mean_kurtosis: float
    attention_mass: float
    first_token_share: float
    sink_rate: float
    attention_entropy: float
    max_logit: float
    first_value_norm: float
    sink_value_norm: float | None
    other_value_norm: float | None
    tokens: int
    final_norm_max_inf_norm: float | None = None
    per_layer: tuple[LayerOutliers, ...] = ()
    by_task: dict[str, TaskOutliers] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One framework at one precision.

    Attributes:
        framework: kind of attention, e.g. `softmax1`.
        precision: `full` or a scheme, e.g. `w4a4-smoothquant`.
        textlm_ppl: perplexity of text after `<generatetext>`.
        speechlm_ppl: perplexity of units after `<generatespeech>`.
        asr_wer: word error rate of the headline split.
        tts_uer: error rate of generated units against the units of the recording.
        tts_cer: character error rate of what a recognizer hears in the generated units as sound.
        tts_wer: the same of words.
        asr: word error rate of every test split by name.
        prose_ppl: the pretrained backbone with this attention and precision, before adaptation and with
            its own tokenizer, on plain English prose.
        outliers: outlier figures of this row's model.
        seconds: wall time of the evaluation.
    """

    framework: str
    precision: str
    textlm_ppl: Perplexity | None = None
    speechlm_ppl: Perplexity | None = None
    asr_wer: ErrorRate | None = None
    tts_uer: ErrorRate | None = None
    tts_cer: ErrorRate | None = None
    tts_wer: ErrorRate | None = None
    asr: dict[str, AsrSplit] = field(default_factory=dict)
    prose_ppl: Perplexity | None = None
    outliers: Outliers | None = None
    seconds: float | None = None

    @property
    def key(self) -> str:
        """The row's name, `framework-precision`."""
        return f"{self.framework}-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class SpeechReference:
    """What the recognizer of TTS hears in something else than a model's speech.

    Attributes:
        name: `recordings`, or `recordings' own units`, spoken as a model's are.
        cer: character error rate over the utterances of TTS.
        wer: word error rate over the same.
    """

    name: str
    cer: ErrorRate
    wer: ErrorRate


@dataclass(frozen=True, kw_only=True)
class AudioSample:
    """A recording to listen to.

    Attributes:
        id: name of the utterance.
        path: the audio file, relative to the folder of results.json.
        reference: what was said.
        hypotheses: what was recognized, by `Row.key`.
    """

    id: str
    path: str
    reference: str
    hypotheses: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The size of one split of the corpus."""

    hours: float
    utterances: int
    speakers: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What produced the numbers: `git_dirty` is None where `git_hash` is "unknown"."""

    git_hash: str
    git_dirty: bool | None
    packages: dict[str, str]
    platform: str
    cpu: str
    num_cpus: int
    num_threads: int
    memory_bytes: int
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run found; `created` is UTC in ISO 8601, `settings` the resolved recipe."""

    name: str
    created: str
    provenance: Provenance
    seed: int
    settings: dict[str, Any]
    corpus: dict[str, SplitSummary]
    rows: tuple[Row, ...]
    wall_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    curves: dict[str, TrainingCurve] = field(default_factory=dict)
    attention_maps: tuple[AttentionMap, ...] = ()
    hidden_maps: tuple[HiddenMap, ...] = ()
    audio: tuple[AudioSample, ...] = ()
    speech_references: tuple[SpeechReference, ...] = ()
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        keys = [row.key for row in self.rows]
        for key in keys:
            if keys.count(key) > 1:
                raise SparqError(f"results hold row {key!r} twice: each framework and precision may appear once")

    @property
    def frameworks(self) -> list[str]:
        """The frameworks of the rows, in table order."""
        return in_order((row.framework for row in self.rows), FRAMEWORKS)

    @property
    def precisions(self) -> list[str]:
        """The precisions of the rows, in table order."""
        return in_order((row.precision for row in self.rows), PRECISIONS)

    def row(self, framework: str, precision: str) -> Row | None:
        """Return the row of a framework and precision, None if it was not measured."""
        return next((r for r in self.rows if (r.framework, r.precision) == (framework, precision)), None)

    def ordered_rows(self) -> list[Row]:
        """Return the rows by framework, then precision."""
        rows = (self.row(framework, precision) for framework in self.frameworks for precision in self.precisions)
        return [row for row in rows if row is not None]


def num_bits(precision: str) -> int:
    """Return weight plus activation bits, e.g. 8 for `w4a4-rtn`; a label without any counts as the most."""
    match = re.match(r"w(\d+)a(\d+)(-|$)", precision)
    return int(match[1]) + int(match[2]) if match else 1000


def in_order(names: Iterator[str], known: tuple[str, ...]) -> list[str]:
    """Return the distinct names, the known ones first and in their order."""
    found = list(dict.fromkeys(names))
    return [name for name in known if name in found] + [name for name in found if name not in known]
