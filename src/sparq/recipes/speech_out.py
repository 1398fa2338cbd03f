"""Sound from a trained SpeechLM: text spoken, recordings spoken anew or continued."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from transformers import PreTrainedModel

from sparq import bfloat16
from sparq.adaptation import SpeechLM
from sparq.audio import check_new_wav, normalize_text, read_waveform, write_wav
from sparq.errors import SparqError
from sparq.evaluation import stream_target
from sparq.recipes.apply import MAX_SECONDS, encode_recordings, load_model
from sparq.recipes.speech_steps import feature_spec
from sparq.tokens import JointVocabulary, prompt_ids
from sparq.types import SAMPLE_RATE, Seconds
from sparq.units import encode_waveforms, load_extractor
from sparq.vocoder.speaker import SpeakerEncoder, load_speaker_encoder
from sparq.vocoder.storage import DESCRIPTION, Vocoder, load_vocoder
from sparq.vocoder.streaming import DurationStream, FrameStream, stream_speech

SpeakingType = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A sound file that was made.

    Attributes:
        path: the file.
        seconds: how long it lasts.
        first_audio: seconds from the model's first work on it to the first samples.
        made: seconds until all samples were there.
    """

    path: Path
    seconds: Seconds
    first_audio: Seconds
    made: Seconds


def speak(
    *,
    model: Path,
    text: str,
    out: Path,
    vocoder: Path | None = None,
    voice: Path | None = None,
    precision: str = "full",
    dtype: SpeakingType | None = None,
    max_new: int = 300,
) -> Spoken:
    """Let a model say a text.

    The model writes units, greedily; the vocoder makes samples of them as soon as enough are known.

    Args:
        model: a model folder, `RUN/models/FRAMEWORK`.
        text: what to say.
        out: the WAV file to write.
        vocoder: a vocoder of the model's units; None takes the one that the package carries.
        voice: a recording of the voice to speak with; None takes the vocoder's default voice.
        precision: `full`, or a scheme for which the run holds a quantized model.
        dtype: type that the model computes in at full precision; a quantized one keeps float32. None is bfloat16 where
            the processor has products of it, else float32.
        max_new: most pieces that the model writes; the papers' 300.

    Raises:
        SparqError: the text is empty or not Latin, the vocoder speaks other units, `out` exists, or the model says
            nothing.
    """
    check_new_wav(out)
    normalized = normalize_text(text)
    if not normalized:
        raise SparqError(f"text {text!r} has nothing to say: write words in Latin script")
    speechlm, network = _load(model, precision, dtype)
    loaded = vocoder_for(speechlm, vocoder)
    speaker = speaker_vector(loaded, voice)
    prompt = prompt_ids(speechlm.vocabulary, "tts", text=normalized)
    ids = stream_target(network, speechlm.vocabulary, prompt, max_new_tokens=max_new)
    portions = units_of(speechlm.vocabulary, ids, dedup=is_deduplicated(speechlm))
    return _write(out, speech(loaded, portions, speaker, dedup=is_deduplicated(speechlm)))


def continue_speech(
    *,
    model: Path,
    file: Path,
    out: Path,
    vocoder: Path | None = None,
    voice: Path | None = None,
    precision: str = "full",
    dtype: SpeakingType | None = None,
    max_new: int = 50,
) -> Spoken:
    """Write what the model says after a recording, in the recording's voice unless another is given.

    Raises:
        SparqError: as `speak`, or the recording is not fit for it.
    """
    check_new_wav(out)
    speechlm, network = _load(model, precision, dtype)
    loaded = vocoder_for(speechlm, vocoder)
    speaker = speaker_vector(loaded, file if voice is None else voice)
    (units,) = encode_recordings(speechlm, [file])
    prompt = (*prompt_ids(speechlm.vocabulary, "speechlm"), *speechlm.vocabulary.encode_units(units))
    ids = stream_target(network, speechlm.vocabulary, prompt, max_new_tokens=max_new)
    portions = units_of(speechlm.vocabulary, ids, dedup=is_deduplicated(speechlm))
    return _write(out, speech(loaded, portions, speaker, dedup=is_deduplicated(speechlm)))


def resynthesize_files(
    *, sources: Sequence[Path], out: Path, vocoder: Path | None = None, voice: Path | None = None
) -> Iterator[Spoken]:
    """Turn recordings into units and back into sound, with their own timing; yield each file as it is written.

    Args:
        sources: recordings of at most a minute.
        out: the folder to write `STEM.wav` into.
        vocoder: None takes the one that the package carries.
        voice: a recording of the voice to speak with; None keeps each recording's own.

    Raises:
        SparqError: a recording is not fit for it, or a file would be overwritten; nothing is written then.
    """
    targets = [check_new_wav(out / f"{source.stem}.wav") for source in sources]
    for target in targets:
        if targets.count(target) > 1:
            raise SparqError(f"several recordings would become {target}: do them one at a time, into other folders")
    loaded = load_packaged_or(vocoder)
    description = loaded.description
    waveforms = [read_waveform(source, max_seconds=MAX_SECONDS) for source in sources]
    extractor = load_extractor(
        feature_spec(description.units.features, description.units.layer, description.units.dtype)
    )
    encoded = encode_waveforms(waveforms, extractor, loaded.kmeans, dedup=False)
    if voice is None:
        encoder = speaker_encoder_of(loaded)
        speakers = [encoder.embed([waveform])[0] for waveform in waveforms]
    else:
        speakers = [speaker_vector(loaded, voice)] * len(waveforms)
    for (units, _), speaker, target in zip(encoded, speakers, targets, strict=True):
        yield _write(target, speech(loaded, [units.tolist()], speaker, dedup=False))


def _load(folder: Path, precision: str, dtype: SpeakingType | None) -> tuple[SpeechLM, PreTrainedModel]:
    """Load a model to speak with.

    One step of it reads every weight for a single piece, so half of the bytes take half of the time where the processor
    has products of them; training had its forward pass in bfloat16, too. Quantized models keep float32, in which their
    integers are exact.
    """
    speechlm, network = load_model(folder, precision)
    if precision != "full":
        return speechlm, network
    fastest = "bfloat16" if bfloat16.is_native(network.device) else "float32"
    return speechlm, network.to(getattr(torch, dtype or fastest))


def load_packaged_or(folder: Path | None, *, units_fingerprint: str | None = None) -> Vocoder:
    """Load a vocoder folder, or without one the vocoder that the package carries.

    Raises:
        SparqError: it is damaged or speaks other units.
    """
    if folder is not None:
        return load_vocoder(folder, units_fingerprint=units_fingerprint)
    with as_file(files("sparq") / "demo" / "vocoder") as packaged:
        return load_vocoder(packaged, units_fingerprint=units_fingerprint)


def vocoder_for(speechlm: SpeechLM, folder: Path | None) -> Vocoder:
    """Load the vocoder for a model's units; see `load_packaged_or`."""
    return load_packaged_or(folder, units_fingerprint=speechlm.description.units_fingerprint)


def speaker_vector(vocoder: Vocoder, recording: Path | None) -> Float32[np.ndarray, "speaker_dim"]:
    """Return the vector of a recording's voice, or the vocoder's default one.

    Raises:
        SparqError: the recording is not fit, or as `speaker_encoder_of`.
    """
    if recording is None:
        return vocoder.voice()
    encoder = speaker_encoder_of(vocoder)
    vector: np.ndarray = encoder.embed([read_waveform(recording, max_seconds=MAX_SECONDS)])[0]
    return vector


def speaker_encoder_of(vocoder: Vocoder) -> SpeakerEncoder:
    """Load the speaker encoder that a vocoder was trained with.

    Raises:
        SparqError: it is not where `vocoder.json` says, or another one is there now.
    """
    description, reference = vocoder.description, vocoder.description.speaker_encoder_reference
    try:
        encoder = load_speaker_encoder(reference)
    except SparqError as error:
        raise SparqError(f"{error}; {vocoder.folder / DESCRIPTION} names it") from error
    if encoder.fingerprint != description.speaker_encoder:
        raise SparqError(
            f"vocoder {vocoder.folder} was trained with speaker encoder {description.speaker_encoder}, but"
            f" {encoder.fingerprint} is at hand as {reference}: take one of its own voices"
        )
    return encoder


def is_deduplicated(speechlm: SpeechLM) -> bool:
    """Tell whether the model writes runs of a unit once."""
    return bool(speechlm.description.training["units"]["dedup"])


def units_of(vocabulary: JointVocabulary, ids: Iterable[int], *, dedup: bool) -> Iterator[list[int]]:
    """Yield the units of each id; a repetition that a model of de-duplicated units writes all the same is dropped."""
    last = None
    for token in ids:
        portion = []
        for unit in vocabulary.decode_units([token]):
            if not (dedup and unit == last):
                portion.append(unit)
            last = unit
        yield portion


def speech(
    vocoder: Vocoder,
    portions: Iterable[Sequence[int]],
    speaker: Float32[np.ndarray, "speaker_dim"],
    *,
    dedup: bool,
) -> Iterator[Float32[np.ndarray, "samples"]]:
    """Yield the samples of units, piece by piece, as soon as enough of them are known.

    Args:
        vocoder: of these units.
        portions: units, as they become known.
        speaker: whose voice.
        dedup: whether the units have no repetitions, so that their durations must be predicted.
    """
    who = torch.from_numpy(np.ascontiguousarray(speaker))
    frames = FrameStream(vocoder.networks.generator, who)
    return stream_speech(portions, frames, DurationStream(vocoder.networks.duration, who) if dedup else None)


def _write(out: Path, pieces: Iterator[Float32[np.ndarray, "samples"]]) -> Spoken:
    start = time.perf_counter()
    first_audio, made = None, []
    for piece in pieces:
        first_audio = time.perf_counter() - start if first_audio is None else first_audio
        made.append(piece)
    if first_audio is None:
        raise SparqError("the model says nothing to this: try another text or model")
    took = time.perf_counter() - start
    samples = np.concatenate(made)
    write_wav(out, samples)
    return Spoken(path=out, seconds=len(samples) / SAMPLE_RATE, first_audio=first_audio, made=took)
