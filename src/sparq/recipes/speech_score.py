"""Scores of speech that was made from known recordings: is it understood, whose voice is it, how natural is it?"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from sparq.audio import Utterance, read_manifest, read_waveform
from sparq.errors import SparqError
from sparq.evaluation import Errors, Transcript, bootstrap_interval, score_transcript, sum_errors, write_records
from sparq.evaluation.naturalness import load_utmos
from sparq.files import atomic_path
from sparq.progress import progress
from sparq.report.listening_page import SideBySide, Sound, sound, write_listening_page
from sparq.report.numbers import listed, show_interval, show_number
from sparq.report.tables import Line, Table
from sparq.vocoder.recognizer import WHISPER, Recognizer
from sparq.vocoder.speaker import load_speaker_encoder

RECORDINGS = "recordings"
"""The system that all others are compared with."""

_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class SpeechRecord(Transcript):
    """What was heard in one utterance of one system, which `task` names, and what else was measured of it.

    Attributes:
        speaker_similarity: cosine of the speaker vectors of this sound and of the recording; of a recording, and of
            another one by the same speaker. None if there is no other.
        utmos: predicted opinion score; None where the package is not installed.
    """

    speaker_similarity: float | None
    utmos: float | None


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over utterances with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SystemScore:
    """Scores of one system over all utterances; None for what was not measured."""

    name: str
    wer: Errors
    cer: Errors
    speaker_similarity: Mean | None
    utmos: Mean | None


@dataclass(frozen=True, kw_only=True)
class _System:
    """Where the sound of each utterance lies."""

    name: str
    utterances: tuple[Utterance, ...]


def score_speech(
    manifest: Path,
    folders: Sequence[Path],
    *,
    out: Path,
    splits: Sequence[str] = (),
    most: int = 0,
    recognizer: str = WHISPER,
    examples: int = 12,
) -> list[SystemScore]:
    """Score folders of made speech beside the recordings that they were made from.

    `out` gets `records.parquet`, a row for each sound, and `listen.html`, on which they are heard side by side.

    Args:
        manifest: the recordings, with their texts and speakers.
        folders: each is a system, with `STEM.wav` for each recording's file, as `sparq resynthesize` writes it.
        out: a new folder.
        splits: those of the manifest to score; all if empty.
        most: the first utterances of each split; 0 for all.
        recognizer: a Whisper.
        examples: how many utterances the page has, evenly chosen.

    Returns:
        The recordings' scores, then each folder's.

    Raises:
        SparqError: `out` exists, a sound is missing or not fit, or nothing has text.
    """
    if out.exists():
        raise SparqError(f"{out} exists already: name a new folder")
    utterances = _chosen(manifest, splits, most)
    listener = Recognizer(recognizer)
    texts = {u.id: listener.normalize(u.text) for u in utterances}
    utterances = [u for u in utterances if texts[u.id]]
    if not utterances:
        raise SparqError(f"{manifest} has no utterance with text: nothing to listen for")
    systems = [_System(name=RECORDINGS, utterances=tuple(utterances)), *(_made(f, utterances) for f in folders)]
    if len({system.name for system in systems}) < len(systems):
        raise SparqError(f"two systems have one name: {', '.join(s.name for s in systems)}; rename a folder")
    records = {system.name: _listen(system, utterances, texts, listener) for system in systems}
    scores = [_score(name, found) for name, found in records.items()]
    with atomic_path(out) as folder:
        folder.mkdir()
        write_records(folder / "records.parquet", [record for found in records.values() for record in found])
        shown = range(0, len(utterances), max(1, len(utterances) // max(1, examples)))[:examples]
        write_listening_page(
            folder / "listen.html",
            title=listed([system.name for system in systems]),
            table=score_table(scores, recognizer),
            utterances=[_beside(utterances[i].id, [(s, records[s.name][i], i) for s in systems]) for i in shown],
        )
    return scores


def score_table(scores: Sequence[SystemScore], recognizer: str) -> Table:
    """Return the scores as a table."""
    lines = [
        Line(
            cells=(
                score.name,
                show_interval(score.wer.rate, score.wer.low, score.wer.high),
                show_interval(score.cer.rate, score.cer.low, score.cer.high),
                *(
                    "-" if mean is None else show_interval(mean.value, mean.low, mean.high)
                    for mean in (score.speaker_similarity, score.utmos)
                ),
            )
        )
        for score in scores
    ]
    words, characters = scores[0].wer, scores[0].cer
    notes = [
        f"Over {words.utterances} utterances, {words.length} words, {characters.length} characters; brackets are 95 %"
        " bootstrap intervals over utterances.",
        f"{recognizer} listened. Similarity: cosine of speaker vectors with the recording, and of recordings with"
        " another one by the same speaker.",
    ]
    if any(score.utmos is None for score in scores):
        notes.append("UTMOS was not measured: the package utmos is not installed.")
    return Table(
        caption="Speech beside its recordings",
        columns=("System", "WER %", "CER %", "Similarity", "UTMOS"),
        groups=(tuple(lines),),
        num_headings=1,
        notes=tuple(notes),
    )


def _chosen(manifest: Path, splits: Sequence[str], most: int) -> list[Utterance]:
    found: dict[str, list[Utterance]] = {}
    for utterance in read_manifest(manifest):
        found.setdefault(utterance.split, []).append(utterance)
    for name in splits:
        if name not in found:
            raise SparqError(f"{manifest} has no split {name!r}: it has {', '.join(map(repr, found))}")
    return [u for name in splits or found for u in found[name][: most or None]]


def _made(folder: Path, utterances: Sequence[Utterance]) -> _System:
    files = [folder / f"{utterance.path.stem}.wav" for utterance in utterances]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise SparqError(f"no such file: {missing[0]}; {len(missing)} of {len(files)} recordings have no sound there")
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise SparqError(f"{twice} would stand for several recordings: score one split, or parts whose files differ")
    own = (
        dataclasses.replace(u, path=file, start=None, seconds=0.0) for u, file in zip(utterances, files, strict=True)
    )
    return _System(name=folder.resolve().name, utterances=tuple(own))


def _listen(
    system: _System, recordings: Sequence[Utterance], texts: dict[str, str], recognizer: Recognizer
) -> list[SpeechRecord]:
    encoder, utmos = load_speaker_encoder(), load_utmos()
    records = []
    with progress(f"listen to {system.name}", total=len(recordings), unit="clip") as bar:
        others = _of_same_speaker(recordings) if system.name == RECORDINGS else list(recordings)
        for first in range(0, len(recordings), _BATCH):
            part = slice(first, first + _BATCH)
            sounds = [_samples(utterance) for utterance in system.utterances[part]]
            heard = recognizer.transcribe(sounds)
            opinions = utmos(sounds) if utmos else [None] * len(sounds)
            beside = {i: _samples(other) for i, other in enumerate(others[part]) if other is not None}
            vectors = encoder.embed([*sounds, *beside.values()])
            cosines = (vectors[list(beside)] * vectors[len(sounds) :]).sum(axis=1)
            likeness = dict(zip(beside, cosines.tolist(), strict=True))
            for index, (utterance, text, opinion) in enumerate(
                zip(system.utterances[part], heard, opinions, strict=True)
            ):
                transcript = score_transcript(
                    id=utterance.id,
                    split=utterance.split,
                    task=system.name,
                    reference=texts[utterance.id],
                    hypothesis=text,
                )
                records.append(
                    SpeechRecord(
                        **dataclasses.asdict(transcript), speaker_similarity=likeness.get(index), utmos=opinion
                    )
                )
            bar.update(len(sounds))
    return records


def _of_same_speaker(recordings: Sequence[Utterance]) -> list[Utterance | None]:
    """Return for each recording the next one by its speaker, the first one for the last; None for a speaker of one."""
    by_speaker: dict[tuple[str, str], list[Utterance]] = {}
    for recording in recordings:
        by_speaker.setdefault((recording.corpus, recording.speaker), []).append(recording)
    following = {
        recording.id: own[(i + 1) % len(own)]
        for (_, speaker), own in by_speaker.items()
        if speaker and len(own) > 1
        for i, recording in enumerate(own)
    }
    return [following.get(recording.id) for recording in recordings]


def _samples(utterance: Utterance) -> Float32[np.ndarray, "samples"]:
    return read_waveform(utterance.path, segment=utterance.segment)


def _score(name: str, records: Sequence[SpeechRecord]) -> SystemScore:
    return SystemScore(
        name=name,
        wer=sum_errors(records, "words"),
        cer=sum_errors(records, "characters"),
        speaker_similarity=_mean([r.speaker_similarity for r in records]),
        utmos=_mean([r.utmos for r in records]),
    )


def _mean(values: Sequence[float | None]) -> Mean | None:
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    # The interval is in percent.
    low, high = bootstrap_interval(known / 100, np.ones(len(known)))
    return Mean(value=float(known.mean()), low=low, high=high)


def _beside(id: str, found: Sequence[tuple[_System, SpeechRecord, int]]) -> SideBySide:
    sounds: list[Sound] = []
    for system, record, index in found:
        measured = {"similarity": record.speaker_similarity, "UTMOS": record.utmos}
        note = ", ".join(f"{name} {show_number(value)}" for name, value in measured.items() if value is not None)
        samples = _samples(system.utterances[index])
        sounds.append(sound(system.name, samples, text=record.reference, heard=record.hypothesis, note=note))
    return SideBySide(id=id, text=found[0][1].reference, sounds=tuple(sounds))
