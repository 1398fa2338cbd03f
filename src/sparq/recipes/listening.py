"""TTS from audio: generated units become sound, a recognizer writes down what it hears, and its errors count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
from jaxtyping import Float32

from sparq.audio import read_manifest, read_waveform
from sparq.evaluation import Transcript, score_transcript, sum_errors, write_records
from sparq.files import atomic_path, write_json
from sparq.recipes.recipe import EvaluateConfig
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_out import speech
from sparq.recipes.train_step import Spoken
from sparq.report import ErrorRate, SpeechReference
from sparq.report.codec import to_json
from sparq.types import SAMPLE_RATE, Seconds
from sparq.vocoder.config import FRAME_HOP
from sparq.vocoder.recognizer import Recognizer
from sparq.vocoder.storage import load_vocoder

HEARD_SECONDS: Seconds = 30.0
"""Whisper hears so much; speech is cut there."""

_HEARD_FRAMES = int(HEARD_SECONDS * SAMPLE_RATE) // FRAME_HOP

NUM_SAMPLES = 2
"""Spoken utterances of each model that are kept as sound."""


class Chosen(NamedTuple):
    """An utterance that is to be spoken."""

    split: str
    utterance: Spoken


def choose_spoken(splits: dict[str, list[Spoken]], settings: EvaluateConfig) -> list[Chosen]:
    """Return the utterances for TTS: evenly over the splits, and the same for every model."""
    everything = [Chosen(name, u) for name, utterances in splits.items() for u in utterances if u.text]
    step = max(1, len(everything) // max(1, settings.tts_utterances))
    return everything[::step][: settings.tts_utterances]


class Listener:
    """The vocoder and the recognizer of a recipe.

    Everything is spoken by the vocoder's default voice, with predicted durations where units are written without
    repetition: a text does not say whose voice is wanted, so all models and the recordings' units get the same one.

    Args:
        settings: of the evaluation; `vocoder` must be there.
        units_fingerprint: of the k-means of the units.
        dedup: whether units are written without repetition.

    Raises:
        SparqError: the vocoder speaks other units, or it or the recognizer cannot be loaded.
    """

    def __init__(self, settings: EvaluateConfig, *, units_fingerprint: str, dedup: bool) -> None:
        assert settings.vocoder is not None
        self._vocoder = load_vocoder(settings.vocoder, units_fingerprint=units_fingerprint)
        self._recognizer = Recognizer(settings.recognizer)
        self._dedup = dedup

    def say(self, units: Sequence[int]) -> Float32[np.ndarray, "samples"]:
        """Return the sound of units, at most `HEARD_SECONDS` of it; none for none."""
        # A unit lasts a frame at least, so what is left out here would not be heard.
        kept = [u for i, u in enumerate(units) if not (self._dedup and i and u == units[i - 1])][:_HEARD_FRAMES]
        pieces = list(speech(self._vocoder, [kept], self._vocoder.voice(), dedup=self._dedup))
        return _audible(np.concatenate(pieces) if pieces else np.zeros(0, np.float32))

    def hear(
        self, chosen: Sequence[Chosen], waveforms: Sequence[Float32[np.ndarray, "_samples"]], *, task: str
    ) -> list[Transcript]:
        """Write down what waveforms say and count the errors against the texts of the chosen utterances.

        Both go through the recognizer's normalizer; an utterance of whose text that leaves nothing is left out.
        Silence is heard as nothing.
        """
        references = [self._recognizer.normalize(c.utterance.text) for c in chosen]
        kept = [i for i, reference in enumerate(references) if reference]
        sounding = [i for i in kept if len(waveforms[i])]
        heard = dict(zip(sounding, self._recognizer.transcribe([waveforms[i] for i in sounding]), strict=True))
        return [
            score_transcript(
                id=chosen[i].utterance.id,
                split=chosen[i].split,
                task=task,
                reference=references[i],
                hypothesis=heard.get(i, ""),
            )
            for i in kept
        ]


def write_references(file: Path, run: RunFolder, listener: Listener, chosen: Sequence[Chosen], label: str) -> None:
    """Measure what TTS is compared with, and write it as JSON, with the transcripts beside it as Parquet.

    Two references: the recordings themselves, and the recordings' own units spoken as a model's would be, which is
    what a model that wrote exactly these units would score.
    """
    paths = {u.id: u for u in read_manifest(run.manifest)}
    recordings = [paths[c.utterance.id] for c in chosen]
    waveforms = {
        "recordings": [_audible(read_waveform(u.path, segment=u.segment)) for u in recordings],
        "recordings' own units": [listener.say(c.utterance.units) for c in chosen],
    }
    transcripts, references = [], []
    for name, sounds in waveforms.items():
        heard = listener.hear(chosen, sounds, task=name)
        if heard:
            transcripts += heard
            cer, wer = (error_rate(heard, unit, label) for unit in ("characters", "words"))
            references.append(SpeechReference(name=name, cer=cer, wer=wer))
    write_records(file.with_suffix(".parquet"), transcripts)
    write_json(file, to_json(references))


def error_rate(transcripts: Sequence[Transcript], unit: Literal["words", "characters"], split: str) -> ErrorRate:
    """Return the word or character error rate of transcripts."""
    counted = sum_errors(transcripts, unit)
    return ErrorRate(
        value=counted.rate,
        errors=counted.errors,
        length=counted.length,
        utterances=counted.utterances,
        split=split,
        low=counted.low,
        high=counted.high,
    )


def write_samples(folder: Path, chosen: Sequence[Chosen], waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> None:
    """Write a few of the waveforms as `folder`/ID.ogg, evenly spread and the same for every model."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for index in range(0, len(chosen), max(1, len(chosen) // NUM_SAMPLES))[:NUM_SAMPLES]:
            if len(waveforms[index]):
                soundfile.write(temporary / f"{chosen[index].utterance.id}.ogg", waveforms[index], SAMPLE_RATE)


def _audible(samples: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "audible"]:
    return samples[: _HEARD_FRAMES * FRAME_HOP]
