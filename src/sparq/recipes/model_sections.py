"""The sections of a recipe about the model: adaptation, quantization and evaluation.

Attributes say where a default comes from, if it has a source.

"SpARQ" is the outlier-free speech paper of 2025, "VoxtLM" is Maiti et al. 2023, whose pipeline it follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from sparq.adaptation import Base, Initialization
from sparq.attention import ATTENTION_NAMES, AttentionSpec
from sparq.errors import SparqError, near_matches
from sparq.quantization.names import settings_of_name
from sparq.quantization.scheme import METHODS, QuantizationScheme
from sparq.recipes.checks import (
    ADDED_LATER,
    NO_EFFECT,
    check,
    check_not_empty,
    check_positive,
    check_unique,
)
from sparq.training.trackers import Tracker
from sparq.vocoder.recognizer import WHISPER

FRAMEWORKS = ("vanilla", "softmax1", "max_shift")
"""The attentions that are compared by default: the pretrained one, the exact softmax_1, and SpARQ equation 3.2."""

SCHEMES = ("w8a8-rtn", "w4a4-rtn", "w8a8-smoothquant", "w4a4-smoothquant")
"""The precisions below full that are made by default: bits of weights and activations, and the method."""

_USUAL_SCHEMES = tuple(f"{bits}-{method}" for method in METHODS for bits in ("w8a8", "w4a8", "w4a4", "w8a16", "w4a16"))


def check_frameworks(where: str, values: Sequence[str]) -> None:
    """Check that each framework is an attention by its name in `sparq.attention.spec`."""
    check(len(values) > 0, where, [], "at least one of " + ", ".join(FRAMEWORKS))
    for index, value in enumerate(values):
        words = [word for word in value.split("+") if word not in ATTENTION_NAMES]
        if words:
            raise SparqError(f"{where}[{index}] is {value!r}: {near_matches(words[0], ATTENTION_NAMES)}")
        # One name for one attention: it names folders.
        name = AttentionSpec.parse(value).name
        check(value == name, f"{where}[{index}]", value, name)
    check_unique(where, values)


def check_scheme(where: str, value: str) -> None:
    """Check the name of a precision, such as w4a4-best or w4g64a4g64-best."""
    try:
        settings = settings_of_name(value)
    except SparqError as error:
        raise SparqError(f"{where} is {value!r}: {near_matches(value, _USUAL_SCHEMES)}") from error
    try:
        QuantizationScheme.from_dict(settings)
    except SparqError as error:
        raise SparqError(f"{where} is {value!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained LLM.

    Attributes:
        backbone: a folder, a hub name, or `pretrained:NAME` for a model that `sparq pretrained` caches.
        new_row_noise: noise on embedding rows of pieces that the backbone lacks, in standard deviations of
            its rows.
    """

    backbone: str
    new_row_noise: float = 1.0

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check_not_empty(where, backbone=self.backbone)
        check(self.new_row_noise >= 0, f"{where}.new_row_noise", self.new_row_noise, "at least 0")


@dataclass(frozen=True, kw_only=True)
class TaskWeights:
    """How often each task is drawn, in proportion; equal in SpARQ section 3.1.

    Attributes:
        asr: speech to text.
        tts: text to speech.
        speechlm: speech alone.
        textlm: text alone.
    """

    asr: float = 1.0
    tts: float = 1.0
    speechlm: float = 1.0
    textlm: float = 1.0

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        for weight in fields(self):
            value = getattr(self, weight.name)
            check(value >= 0, f"{where}.{weight.name}", value, "at least 0")
        weights = [getattr(self, weight.name) for weight in fields(self)]
        check(any(weights), where, "all 0", "at least one weight above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the LLM is adapted; defaults are SpARQ appendix E.1's, or VoxtLM's where that is silent.

    Attributes:
        updates: number of optimizer updates.
        method: LoRA, LoRA on a quantized base (QLoRA), or full fine-tuning.
        rank: LoRA's rank.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        dropout: LoRA's dropout.
        targets: linear layers that get adapters; empty for the family's attention and MLP layers.
        base: what QLoRA's base is kept in; SpARQ section 4.2 has 8-bit integers.
        initialization: what the adapters start from.
        dora: train the length of each row of the adapted weights apart from its direction.
        rslora: scale the update by alpha / sqrt(rank).
        loftq_iterations: rounds of LoftQ's initialization; its authors'.
        learning_rate: Adam's peak rate.
        warmup_updates: updates over which the rate rises from 0.
        packing: put sequences one after another without padding; else pad batches of like length.
        batch_tokens: tokens of a micro-batch at most, padding counted.
        long_length: with packing, micro-batches of sequences longer than this hold fewer tokens, because the cost of
            their attention grows with the square.
        accumulate: micro-batches of an update; 40 make 200k tokens, VoxtLM's.
        label_smoothing: weight of the uniform distribution in the target; VoxtLM's.
        weight_decay: Adam's.
        clip_norm: largest norm of the gradient; VoxtLM's.
        schedule: what the rate does after the warm-up.
        task_weights: how often each task is drawn.
        task_temperature: T of a mixture of tasks in proportion to weight * n^(1/T), n being the utterances that can be
            the task; none shows every utterance once an epoch, as a task drawn by weight.
        corpus_weights: how often an epoch shows each utterance of a corpus; a corpus not named is shown once.
        extra_text: text files whose lines are examples of TextLM besides the transcripts, a sentence a line, plain or
            `.gz`; paths as in a source's manifest.
        extra_lines: lines of each of these that an epoch shows, other ones in the next until all were shown; 0 for all.
        unit_noise: share of the units in ASR prompts that are dropped or replaced at random; 0 for none.
        dtype: type of the forward pass; the optimizer works in float32.
        checkpoint_updates: updates between two resumable states.
        validate_updates: updates between two validations, of which the first and the last update have one, too; the
            state of best accuracy is kept (VoxtLM).
        average_best: the result is the mean of the states of so many validations, those of best accuracy; VoxtLM
            takes 10.
        patience: validations without a new best accuracy after which training ends; none for all updates.
        kurtosis_weight: weight in the loss of the kurtosis of the blocks' outputs, averaged over blocks; 0 for none.
        max_norm_weight: weight in the loss of their largest element, likewise.
        loggers: experiment trackers that are told every update, besides the plain log.
        profile: updates of which a table of the time of every operation is written, after two others; 0 for none.
        sink_updates: updates over which the attention of `softmax1` and `learned_sink` goes from the pretrained one to
            its own, so that training starts from the pretrained function; 0 for at once. Other frameworks do not read
            it.
        seed: of adapters, new rows, order and dropout, so that models differ by chance on the same units and pieces;
            the recipe's if null.
    """

    updates: int
    method: Literal["full", "lora", "qlora"] = "lora"
    rank: int = 256
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    base: Base = "int8"
    initialization: Initialization = "kaiming"
    dora: bool = False
    rslora: bool = False
    loftq_iterations: int = 5
    learning_rate: float = 3e-4
    warmup_updates: int = 2500
    packing: bool = True
    batch_tokens: int = 5000
    long_length: int = 1024
    accumulate: int = 40
    label_smoothing: float = 0.1
    weight_decay: float = 1e-6
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    task_weights: TaskWeights = field(default_factory=TaskWeights)
    task_temperature: float | None = None
    corpus_weights: dict[str, float] = field(default_factory=dict)
    extra_text: tuple[Path, ...] = field(default=(), metadata=ADDED_LATER)
    extra_lines: int = field(default=0, metadata=ADDED_LATER)
    unit_noise: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpoint_updates: int = field(default=50, metadata=NO_EFFECT)
    validate_updates: int = 100
    average_best: int = 1
    patience: int | None = None
    kurtosis_weight: float = 0.0
    max_norm_weight: float = 0.0
    loggers: tuple[Tracker, ...] = field(default=(), metadata=NO_EFFECT)
    profile: int = field(default=0, metadata=NO_EFFECT)
    sink_updates: int = 0
    seed: int | None = field(default=None, metadata=ADDED_LATER)

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check_positive(where, updates=self.updates, rank=self.rank, alpha=self.alpha, clip_norm=self.clip_norm)
        check_positive(where, batch_tokens=self.batch_tokens, accumulate=self.accumulate)
        check_positive(where, learning_rate=self.learning_rate, checkpoint_updates=self.checkpoint_updates)
        check_positive(where, validate_updates=self.validate_updates, average_best=self.average_best)
        check_positive(where, long_length=self.long_length)
        check(self.patience is None or self.patience > 0, f"{where}.patience", self.patience, "more than 0, or null")
        for name in ("dropout", "label_smoothing", "unit_noise"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{where}.{name}", value, "at least 0 and less than 1")
        for name in ("weight_decay", "kurtosis_weight", "max_norm_weight"):
            check(getattr(self, name) >= 0, f"{where}.{name}", getattr(self, name), "at least 0")
        check_unique(f"{where}.targets", self.targets)
        check(self.profile >= 0, f"{where}.profile", self.profile, "at least 0")
        check_unique(f"{where}.loggers", self.loggers)
        check_positive(where, loftq_iterations=self.loftq_iterations)
        self._validate_method(where)
        self.task_weights.validate(f"{where}.task_weights")
        right = "more than 0, or null"
        check(
            self.task_temperature is None or self.task_temperature > 0,
            f"{where}.task_temperature",
            self.task_temperature,
            right,
        )
        for corpus, weight in self.corpus_weights.items():
            check(weight >= 0, f"{where}.corpus_weights.{corpus}", weight, "at least 0")
        check(self.extra_lines >= 0, f"{where}.extra_lines", self.extra_lines, "at least 0")
        if not self.extra_text:
            right = f"0, because {where}.extra_text names no file"
            check(self.extra_lines == 0, f"{where}.extra_lines", self.extra_lines, right)
        # Otherwise the peak rate would never be reached, and nobody would see it.
        right = f"from 0 to {where}.updates, {self.updates}"
        check(0 <= self.warmup_updates <= self.updates, f"{where}.warmup_updates", self.warmup_updates, right)
        check(0 <= self.sink_updates <= self.updates, f"{where}.sink_updates", self.sink_updates, right)
        check(self.seed is None or 0 <= self.seed < 2**32, f"{where}.seed", self.seed, "from 0 to 4294967295, or null")

    def _validate_method(self, where: str) -> None:
        # PiSSA and OLoRA take their start out of a base in floating point; LoftQ makes up for rounding one.
        fitting = {
            "full": ("kaiming",),
            "lora": ("kaiming", "pissa", "olora", "eva"),
            "qlora": ("kaiming", "eva", "loftq"),
        }[self.method]
        right = f"{' or '.join(fitting)} with method {self.method}"
        check(self.initialization in fitting, f"{where}.initialization", self.initialization, right)
        for name in ("dora", "rslora"):
            right = "false with method full"
            check(self.method != "full" or not getattr(self, name), f"{where}.{name}", getattr(self, name), right)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Which low-bit models are made.

    Attributes:
        schemes: names of precisions, bits and method; W8A8 and W4A4 in SpARQ section 4.1.
        calibration_sequences: training sequences on which methods measure or train; 256 in SpARQ appendix E.2, and for
            SmoothQuant 128 hardly differ.
        smoothing_alpha: SmoothQuant's migration strength; SpARQ appendix E.2.
    """

    schemes: tuple[str, ...] = SCHEMES
    calibration_sequences: int = 128
    smoothing_alpha: float = 0.5

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check(len(self.schemes) > 0, f"{where}.schemes", [], "at least one, such as " + ", ".join(SCHEMES))
        for index, name in enumerate(self.schemes):
            check_scheme(f"{where}.schemes[{index}]", name)
        check_unique(f"{where}.schemes", self.schemes)
        check_positive(where, calibration_sequences=self.calibration_sequences)
        check(0 <= self.smoothing_alpha <= 1, f"{where}.smoothing_alpha", self.smoothing_alpha, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is evaluated, and how decoding goes.

    Attributes:
        max_utterances: utterances of each test split; 0 for all.
        tts_utterances: of these, how many are spoken; 0 for none.
        textlm_utterances: of these, how many count for text perplexity; 0 for all.
        beam: beam width of ASR and TTS; 5 in VoxtLM, 1 is much faster.
        batch_size: sequences decoded together.
        max_new_text: most text pieces of a transcript.
        vocoder: a vocoder of the units, by which TTS is measured from audio; none leaves it at the units.
        recognizer: the Whisper that listens to TTS: a folder, a hub name or `pretrained:NAME`.
        prose: a text file for the perplexity of ordinary text; paths as in a source's manifest.
    """

    max_utterances: int = 0
    tts_utterances: int = 50
    textlm_utterances: int = 0
    beam: int = 1
    batch_size: int = 32
    max_new_text: int = 100
    vocoder: Path | None = None
    recognizer: str = WHISPER
    prose: Path | None = None

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        for name in ("max_utterances", "tts_utterances", "textlm_utterances"):
            check(getattr(self, name) >= 0, f"{where}.{name}", getattr(self, name), "at least 0")
        check_not_empty(where, recognizer=self.recognizer)
        check_positive(where, beam=self.beam, batch_size=self.batch_size, max_new_text=self.max_new_text)
