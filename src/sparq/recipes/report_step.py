"""The step that gathers every number of a run into results.json and report.html."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch

from sparq.adaptation import SpeechLM, load_speechlm
from sparq.audio.manifest import read_manifest
from sparq.audio.waveform import read_waveform
from sparq.configuration import to_mapping
from sparq.devices import compute_device
from sparq.evaluation import read_records
from sparq.files import read_json, remove
from sparq.pretrained import resolve_model, weights_note
from sparq.recipes.evaluate_step import test_splits
from sparq.recipes.pictures import Pictures
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.train_step import Spoken, load_split, training_folder
from sparq.report import (
    FULL,
    AudioSample,
    CurvePoint,
    LiveSlice,
    Results,
    Row,
    SpeechReference,
    SplitSummary,
    TrainingCurve,
    collect_provenance,
    utc_now,
    write_html,
    write_results,
)
from sparq.report.codec import references_from_json, row_from_json
from sparq.report.numbers import precision_label
from sparq.tokens import make_example
from sparq.training import Update, read_log
from sparq.types import SAMPLE_RATE
from sparq.units import read_summary

NUM_CLIPS = 3
NUM_EXAMPLES = 8
"""Transcripts of each split in the report; all of them are in `RUN/evaluation`."""
NO_VOCODER = (
    "TTS was not measured from audio: the recipe names no vocoder (evaluate.vocoder). The column gives the error rate"
    " of the generated units against the units of the recording instead; the prompt does not say whose voice is wanted,"
    " so it stays high."
)
HEARD_BY = "TTS was heard by {recognizer} in the vocoder's default voice."
SAME_FAMILY = (
    " The units come from a Whisper too ({features}, layer {layer}), so the recognizer may find in them what it listens"
    " for: one of another family may hear more errors, in the recordings' own units as well."
)


def run_report(recipe: Recipe, run: RunFolder) -> list[Path]:
    """Write results.json and report.html."""
    set_threads(recipe)
    results = gather(recipe, run)
    write_results(run.results, results)
    write_html(run.report, results, folder=run.path)
    return [run.results, run.report, run.path / "clips"]


def gather(recipe: Recipe, run: RunFolder) -> Results:
    """Collect the results of the steps; nothing is measured here but the pictures."""
    rows = tuple(
        row_from_json(read_json(run.evaluation(framework, precision)), str(run.evaluation(framework, precision)))
        for framework in recipe.frameworks
        for precision in (FULL, *recipe.quantize.schemes)
    )
    prepared = read_manifest(run.manifest)
    corpus = {}
    for split in sorted({u.split for u in prepared}):
        own = [u for u in prepared if u.split == split]
        corpus[split] = SplitSummary(
            hours=sum(u.seconds for u in own) / 3600,
            utterances=len(own),
            speakers=len({(u.corpus, u.speaker) for u in own}),
        )
    pictures = Pictures()
    sample: Spoken | None = None
    for framework in recipe.frameworks:
        speechlm = load_speechlm(run.model(framework))
        speechlm.model.to(compute_device())
        sample = sample or _sample(run, speechlm)
        pictures.add(framework, speechlm.model, *_sequence(speechlm, sample))
    stamps = {path.stem: run.stamp(path.stem) for path in sorted(run.steps.glob("*.json"))}
    done = {name: stamp for name, stamp in stamps.items() if stamp and stamp.seconds is not None}
    return Results(
        name=recipe.name,
        created=utc_now(),
        provenance=collect_provenance(),
        seed=recipe.seed,
        settings=to_mapping(recipe),
        corpus=corpus,
        rows=tuple(_with_few_examples(row) for row in rows),
        wall_seconds={name: stamp.seconds for name, stamp in done.items() if stamp.seconds is not None},
        peak_memory_bytes={name: stamp.peak_memory_bytes for name, stamp in done.items() if stamp.peak_memory_bytes},
        curves={framework: training_curve(run, framework) for framework in recipe.frameworks},
        attention_maps=tuple(pictures.attention),
        hidden_maps=tuple(pictures.hidden),
        audio=_clips(run, rows),
        speech_references=_references(recipe, run),
        notes=_notes(recipe, run),
    )


def _with_few_examples(row: Row) -> Row:
    """Keep `NUM_EXAMPLES` transcripts of each split, evenly spread and the same for every row."""
    asr = {
        name: dataclasses.replace(
            split, examples=split.examples[:: max(1, len(split.examples) // NUM_EXAMPLES)][:NUM_EXAMPLES]
        )
        for name, split in row.asr.items()
    }
    return dataclasses.replace(row, asr=asr)


def _notes(recipe: Recipe, run: RunFolder) -> tuple[str, ...]:
    notes = [
        _speech_note(recipe, run),
        "Low-bit models are simulated with exact integer semantics; nothing here is a speed.",
    ]
    backbone = weights_note(Path(resolve_model(recipe.model.backbone)))
    if backbone:
        notes.append(backbone)
    return tuple(notes)


def _speech_note(recipe: Recipe, run: RunFolder) -> str:
    evaluate, units = recipe.evaluate, recipe.units
    if evaluate.vocoder is None:
        return NO_VOCODER
    note = HEARD_BY.format(recognizer=evaluate.recognizer)
    if read_summary(run.units)["extractor"]["kind"] == "whisper":
        note += SAME_FAMILY.format(features=units.features, layer=units.layer)
    return note


def _references(recipe: Recipe, run: RunFolder) -> tuple[SpeechReference, ...]:
    file = run.references(recipe.frameworks[0])
    return references_from_json(read_json(file), str(file)) if file.exists() else ()


def _sample(run: RunFolder, speechlm: SpeechLM) -> Spoken:
    """Return the shortest test utterance, transcribed if there is one: its picture is the most legible."""
    spoken = [u for name in test_splits(run) for u in load_split(run, name, speechlm.vocabulary)]
    return min(spoken, key=lambda u: (not u.text, len(u.units), u.id))


def _sequence(speechlm: SpeechLM, sample: Spoken) -> tuple[torch.Tensor, tuple[str, ...]]:
    example = make_example(speechlm.vocabulary, "asr", text=sample.text, units=sample.units)
    ids = (*example.prompt, *example.target)
    pieces = speechlm.vocabulary.pieces
    return torch.tensor(ids), tuple(pieces[i] for i in ids)


def training_curve(run: RunFolder, framework: str) -> TrainingCurve:
    """Return the log of a training, with the slice that was repeated live, if there is one."""
    log = read_log(training_folder(run, framework) / "train.jsonl")
    live_log = read_log(training_folder(run, framework) / "live" / "train.jsonl")
    live = None
    if live_log:
        pairs = list(zip(live_log, log, strict=False))
        same = all(a.tokens == b.tokens for a, b in pairs)
        difference = max(abs(a.loss - b.loss) for a, b in pairs) if same else None
        live = LiveSlice(points=_points(live_log), max_abs_difference=difference)
    return TrainingCurve(points=_points(log), live=live)


def _points(log: Sequence[Update]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            update=update.update,
            tokens=update.tokens,
            seconds=update.seconds,
            loss=update.loss,
            lr=update.learning_rate,
            valid_accuracy=update.valid_accuracy,
            valid_loss=update.valid_nll,
            valid_max_norm=max(o.max_norm for o in update.valid_outliers.values()) if update.valid_outliers else None,
            epochs=update.epochs,
        )
        for update in log
    )


def _clips(run: RunFolder, rows: Sequence[Row]) -> tuple[AudioSample, ...]:
    """Copy a few test recordings beside the report, evenly over the splits, with what each model heard."""
    heard: dict[str, dict[str, str]] = {}
    references: dict[str, str] = {}
    for row in rows:
        for split in row.asr.values():
            for example in split.examples:
                heard.setdefault(example.id, {})[row.key] = example.hypothesis
                references[example.id] = example.reference
    spoken = {u.id: u for u in read_manifest(run.manifest) if u.id in references}
    ids = sorted(references)
    chosen = ids[:: max(1, len(ids) // NUM_CLIPS)][:NUM_CLIPS]
    remove(run.path / "clips")
    (run.path / "clips").mkdir()
    samples = []
    for id_ in chosen:
        utterance = spoken[id_]
        if utterance.segment is None:
            copy = run.path / "clips" / f"{id_}{utterance.path.suffix}"
            shutil.copyfile(utterance.path, copy)
        else:  # the file may be a whole chapter
            copy = run.path / "clips" / f"{id_}.flac"
            soundfile.write(copy, read_waveform(utterance.path, segment=utterance.segment), SAMPLE_RATE)
        samples.append(
            AudioSample(id=id_, path=str(copy.relative_to(run.path)), reference=references[id_], hypotheses=heard[id_])
        )
    return (*samples, *_spoken_clips(run, rows))


def _spoken_clips(run: RunFolder, rows: Sequence[Row]) -> list[AudioSample]:
    """Copy what the models said beside the report, by utterance, with what the recognizer heard in it."""
    samples = []
    for row in rows:
        folder = run.samples(row.framework, row.precision)
        records = run.evaluation(row.framework, row.precision).with_suffix(".parquet")
        spoken = {t.id: t for t in read_records(records) if t.task == "tts"} if folder.exists() else {}
        for file in sorted(folder.glob("*.ogg")):
            if (said := spoken.get(file.stem)) is None:  # its text is nothing to the recognizer's normalizer
                continue
            copy = run.path / "clips" / f"{row.key}-{file.name}"
            shutil.copyfile(file, copy)
            samples.append(
                AudioSample(
                    id=f"{file.stem}, spoken by {row.framework}, {precision_label(row.precision)}",
                    path=str(copy.relative_to(run.path)),
                    reference=said.reference,
                    hypotheses={"the recognizer": said.hypothesis},
                )
            )
    return sorted(samples, key=lambda sample: sample.id.partition(",")[0])
