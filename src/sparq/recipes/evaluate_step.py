"""The step that measures one framework at every precision, on the four tasks, prose and outliers."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from sparq.adaptation import SpeechLM, load_speechlm
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation import (
    Transcript,
    generate_targets,
    measure_outliers,
    prose_perplexity,
    score_transcript,
    sum_errors,
    task_perplexity,
    unit_errors,
    write_records,
)
from sparq.files import read_text, write_json
from sparq.models import load_backbone
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers
from sparq.progress import progress
from sparq.quantization import load_quantized, quantize
from sparq.recipes.listening import Chosen, Listener, choose_spoken, error_rate, write_references, write_samples
from sparq.recipes.outlier_sequences import TASK_LABELS, alone, measure_tasks, sequence_ids, task_sequences
from sparq.recipes.pictures import outlier_figures
from sparq.recipes.quantize_step import scheme_of_name
from sparq.recipes.recipe import EvaluateConfig, Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.train_step import Spoken, load_split
from sparq.report import AsrSplit, ErrorRate, Example, Outliers, Perplexity, Row
from sparq.report.codec import to_json
from sparq.tokens import JointVocabulary, make_example, prompt_ids
from sparq.types import Task
from sparq.units import read_summary

_LOG = logging.getLogger(__name__)

FULL = "full"
PROSE_CONTEXT = 1024
OUTLIER_SEQUENCES = 32
"""Sequences, half of them ASR and half text, on which the outliers are measured."""


def test_splits(run: RunFolder) -> list[str]:
    """Return the names of the test splits, `test` first."""
    splits = sorted(name for name in read_summary(run.units)["splits"] if name.startswith("test"))
    if not splits:
        raise SparqError(
            f"{run.manifest} has no test split: hold some utterances out (test_fraction, or a split column)"
        )
    return splits


def run_evaluate(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
    """Measure the adapted model at full precision and under every scheme; what is measured already is kept."""
    set_threads(recipe)
    speechlm = load_speechlm(run.model(framework))
    splits = {name: _limited(load_split(run, name, speechlm.vocabulary), recipe) for name in test_splits(run)}
    precisions = (FULL, *recipe.quantize.schemes)
    files = [run.evaluation(framework, precision) for precision in precisions]
    prose = _Prose(recipe, framework) if recipe.evaluate.prose else None
    chosen = choose_spoken(splits, recipe.evaluate)
    listener = load_listener(recipe, run, speechlm) if chosen else None
    # They are the same for every framework, so the first one has them.
    references = run.references(framework)
    if listener and framework == recipe.frameworks[0] and not references.exists():
        write_references(references, run, listener, chosen, "+".join(splits))
    for precision, file in zip(precisions, files, strict=True):
        if file.exists():
            continue
        model = speechlm.model if precision == FULL else load_quantized(run.quantized(framework, precision))
        model.to(compute_device())
        start = time.perf_counter()
        row, transcripts = measure(
            model,
            speechlm.vocabulary,
            splits,
            recipe,
            framework=framework,
            precision=precision,
            listener=listener,
            samples=run.samples(framework, precision),
        )
        if prose:
            row = dataclasses.replace(row, prose_ppl=prose.measure(precision))
        row = dataclasses.replace(row, seconds=round(time.perf_counter() - start, 2))
        write_records(file.with_suffix(".parquet"), transcripts)
        write_json(file, to_json(row))  # last: it says that all of this precision is there
        wer = f", WER {row.asr_wer.value:.1f} %" if row.asr_wer else ""
        _LOG.info("  %s %s%s (%.0f s)", framework, precision, wer, row.seconds)
    return [run.evaluation(framework)]


def load_listener(recipe: Recipe, run: RunFolder, speechlm: SpeechLM) -> Listener | None:
    """Return what hears a model of a run, or None if the recipe has no vocoder."""
    if recipe.evaluate.vocoder is None:
        return None
    fingerprint = speechlm.description.units_fingerprint
    return Listener(recipe.evaluate, units_fingerprint=fingerprint, dedup=read_summary(run.units)["dedup"])


def _limited(utterances: list[Spoken], recipe: Recipe) -> list[Spoken]:
    count = recipe.evaluate.max_utterances
    return utterances[:count] if count else utterances


def measure(
    model: PreTrainedModel,
    vocabulary: JointVocabulary,
    splits: dict[str, list[Spoken]],
    recipe: Recipe,
    *,
    framework: str,
    precision: str,
    listener: Listener | None,
    samples: Path,
) -> tuple[Row, list[Transcript]]:
    """Measure one model on every test split; return its row and the transcripts that the error rates come from.

    The headline figures are over all test splits together; recognition is given for each split as well.

    Args:
        model: the model.
        vocabulary: its vocabulary.
        splits: utterances of each test split.
        recipe: how much is measured.
        framework: name of its attention.
        precision: `full` or a scheme.
        listener: hears what the model says; None leaves TTS at the error rate of its units.
        samples: the folder for some of what was heard.
    """
    settings = recipe.evaluate
    everything = [u for utterances in splits.values() for u in utterances]
    spoken = [u for u in everything if u.text]
    label = "+".join(splits)
    asr = {
        name: recognize(model, vocabulary, name, with_text, settings, f"{framework} {precision} {name}")
        for name, utterances in splits.items()
        if (with_text := [u for u in utterances if u.text])
    }
    transcripts = [t for split in asr.values() for t in split]
    texts = spoken[: settings.textlm_utterances] if settings.textlm_utterances else spoken
    chosen = choose_spoken(splits, settings)
    said = _synthesize(model, vocabulary, [c.utterance for c in chosen], settings) if chosen else []
    heard: list[Transcript] = []
    if listener:
        waveforms = [listener.say(units) for units in said]
        write_samples(samples, chosen, waveforms)
        heard = listener.hear(chosen, waveforms, task="tts")
    row = Row(
        framework=framework,
        precision=precision,
        textlm_ppl=_task_perplexity(model, vocabulary, "textlm", texts, settings, label),
        speechlm_ppl=_task_perplexity(model, vocabulary, "speechlm", everything, settings, label),
        asr_wer=error_rate(transcripts, "words", label) if transcripts else None,
        tts_uer=_unit_errors(chosen, said, label) if said else None,
        tts_cer=error_rate(heard, "characters", label) if heard else None,
        tts_wer=error_rate(heard, "words", label) if heard else None,
        asr={name: _asr_split(split) for name, split in asr.items()},
        outliers=_outliers(
            model,
            vocabulary,
            everything[:: max(1, 2 * len(everything) // OUTLIER_SEQUENCES)],
            by_task=precision == FULL,
        ),
    )
    return row, transcripts + heard


def _task_perplexity(
    model: PreTrainedModel,
    vocabulary: JointVocabulary,
    task: Task,
    utterances: Sequence[Spoken],
    settings: EvaluateConfig,
    split: str,
) -> Perplexity | None:
    if not utterances:
        return None
    examples = [make_example(vocabulary, task, text=u.text, units=u.units) for u in utterances]
    measured = task_perplexity(model, examples, batch_size=settings.batch_size)
    return Perplexity(value=measured.value, tokens=measured.num_tokens, utterances=len(utterances), split=split)


def recognize(
    model: PreTrainedModel,
    vocabulary: JointVocabulary,
    split: str,
    utterances: Sequence[Spoken],
    settings: EvaluateConfig,
    label: str,
) -> list[Transcript]:
    """Let a model transcribe the utterances of a split, which all have a text; `label` names the bar."""
    with progress(f"transcribe {label}", total=len(utterances), unit="utt") as bar:
        generated = generate_targets(
            model,
            vocabulary,
            [prompt_ids(vocabulary, "asr", units=u.units) for u in utterances],
            max_new_tokens=settings.max_new_text,
            num_beams=settings.beam,
            batch_size=settings.batch_size,
            on_done=bar.update,
        )
    return [
        score_transcript(id=u.id, split=split, task="asr", reference=u.text, hypothesis=vocabulary.decode_text(ids))
        for u, ids in zip(utterances, generated, strict=True)
    ]


def _asr_split(transcripts: Sequence[Transcript]) -> AsrSplit:
    counted = sum_errors(transcripts, "words")
    return AsrSplit(
        wer=counted.rate,
        words=counted.length,
        utterances=counted.utterances,
        errors=counted.errors,
        low=counted.low,
        high=counted.high,
        examples=tuple(Example(id=t.id, reference=t.reference, hypothesis=t.hypothesis) for t in transcripts),
    )


def _synthesize(
    model: PreTrainedModel,
    vocabulary: JointVocabulary,
    utterances: Sequence[Spoken],
    settings: EvaluateConfig,
) -> list[list[int]]:
    """Return the units that the model writes for each text."""
    longest = max(len(vocabulary.encode_units(u.units)) for u in utterances)
    generated = generate_targets(
        model,
        vocabulary,
        [prompt_ids(vocabulary, "tts", text=u.text) for u in utterances],
        # A model that never ends would fill any bound with insertions; this one is the longest reference and half.
        max_new_tokens=longest + longest // 2,
        num_beams=settings.beam,
        batch_size=settings.batch_size,
    )
    return [vocabulary.decode_units(ids) for ids in generated]


def _unit_errors(chosen: Sequence[Chosen], said: Sequence[Sequence[int]], split: str) -> ErrorRate:
    counted = unit_errors([c.utterance.units for c in chosen], said)
    return ErrorRate(
        value=counted.rate,
        errors=counted.errors,
        length=counted.units,
        utterances=counted.utterances,
        split=split,
    )


def _outliers(
    model: PreTrainedModel, vocabulary: JointVocabulary, utterances: Sequence[Spoken], *, by_task: bool
) -> Outliers:
    """Measure ASR and text together (units, where the text is not known), and on demand each task apart."""
    everything = [
        sequence_ids(make_example(vocabulary, task, text=u.text, units=u.units))
        for u in utterances
        for task in (("asr", "textlm") if u.text else ("speechlm",))
    ]
    pairs = [(u.text, u.units) for u in utterances]
    apart = {label: task_sequences(vocabulary, task, pairs) for task, label in TASK_LABELS.items()} if by_task else {}
    return outlier_figures(measure_outliers(model, alone(everything)), measure_tasks(model, apart))


class _Prose:
    """The backbone before adaptation, with its own tokenizer, on plain English: the damage at its source.

    The first window calibrates SmoothQuant and is not measured.
    """

    def __init__(self, recipe: Recipe, framework: str) -> None:
        assert recipe.evaluate.prose is not None
        reference = resolve_model(recipe.model.backbone)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(reference)
        text = read_text(recipe.evaluate.prose)
        ids = tokenizer(" ".join(text.split()), return_tensors="pt", add_special_tokens=False).input_ids[0]
        self.model = load_backbone(reference, attention=framework).model.to(compute_device())
        self.context = min(PROSE_CONTEXT, self.model.config.max_position_embeddings)
        self.calibration, self.measured = ids[: self.context], ids[self.context :]
        if len(self.measured) < self.context:
            raise SparqError(
                f"{recipe.evaluate.prose} has {len(ids)} tokens: the first {self.context} calibrate and at least as"
                f" many more are measured, so give a text of {2 * self.context} tokens or more"
            )
        self.alpha = recipe.quantize.smoothing_alpha
        self.name = recipe.evaluate.prose.name

    def measure(self, precision: str) -> Perplexity:
        model = self.model
        if precision != FULL:
            model = quantize(model, [self.calibration[None]], scheme_of_name(precision, self.alpha))
        measured = prose_perplexity(model, self.measured, context=self.context)
        return Perplexity(value=measured.value, tokens=measured.num_tokens, utterances=1, split=self.name)
