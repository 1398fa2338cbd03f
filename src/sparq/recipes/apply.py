"""Use a trained model: write down recordings, continue a text or a recording."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from transformers import PreTrainedModel

from sparq.adaptation import SpeechLM, load_speechlm
from sparq.audio.text import normalize_text
from sparq.audio.waveform import read_waveform
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation import generate_targets
from sparq.quantization import load_quantized
from sparq.recipes.speech_steps import feature_spec
from sparq.tokens import prompt_ids
from sparq.units import KMeans, encode_waveforms, load_extractor

MAX_SECONDS = 60.0
"""Longer recordings are far outside of what a model is trained on."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What a model wrote down for one file."""

    path: Path
    text: str


def load_model(folder: Path, precision: str) -> tuple[SpeechLM, PreTrainedModel]:
    """Load a model folder, and the network to run: the trained one, or the run's quantized one.

    Raises:
        SparqError: the folder is damaged, or the run has no model of that precision.
    """
    speechlm = load_speechlm(folder)
    if precision == "full":
        return speechlm, speechlm.model.to(compute_device())
    # RUN/models/FRAMEWORK -> RUN/quantized/FRAMEWORK/PRECISION
    quantized = folder.absolute().parent.parent / "quantized" / folder.absolute().name / precision
    if not quantized.is_dir():
        raise SparqError(f"no {precision} model at {quantized}: `sparq quantize` makes it beside the trained one")
    return speechlm, load_quantized(quantized).to(compute_device())


def encode_recordings(speechlm: SpeechLM, files: Sequence[Path]) -> list[list[int]]:
    """Return the units of recordings as the model was trained on them.

    Raises:
        SparqError: a recording is not fit for it, or the k-means is not the model's.
    """
    return encode_samples(speechlm, [read_waveform(file, max_seconds=MAX_SECONDS) for file in files])


def encode_samples(speechlm: SpeechLM, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[list[int]]:
    """Return the units of 16 kHz mono samples as the model was trained on them.

    Raises:
        SparqError: the k-means is not the model's.
    """
    if not waveforms:
        return []
    kmeans = KMeans.load(speechlm.kmeans_file)
    if kmeans.fingerprint != speechlm.description.units_fingerprint:
        raise SparqError(
            f"{speechlm.kmeans_file} has fingerprint {kmeans.fingerprint}, but the model was trained on units"
            f" {speechlm.description.units_fingerprint}: restore the file that it was trained with"
        )
    settings = speechlm.description.training["units"]
    extractor = load_extractor(feature_spec(settings["features"], settings["layer"], settings["dtype"]))
    encoded = encode_waveforms(waveforms, extractor, kmeans, dedup=settings["dedup"])
    return [units.tolist() for units, _ in encoded]


def transcribe(*, model: Path, files: Sequence[Path], precision: str = "full", max_new: int = 200) -> list[Transcript]:
    """Return the text of each recording.

    Args:
        model: a model folder, `RUN/models/FRAMEWORK`.
        files: recordings of at most a minute.
        precision: `full`, or a scheme for which the run holds a quantized model.
        max_new: most text pieces of a transcript.

    Raises:
        SparqError: a file or the model is not fit for it; nothing is transcribed then.
    """
    speechlm, network = load_model(model, precision)
    prompts = [prompt_ids(speechlm.vocabulary, "asr", units=units) for units in encode_recordings(speechlm, files)]
    generated = generate_targets(network, speechlm.vocabulary, prompts, max_new_tokens=max_new)
    return [
        Transcript(path=file, text=speechlm.vocabulary.decode_text(ids))
        for file, ids in zip(files, generated, strict=True)
    ]


def continue_text(*, model: Path, text: str, precision: str = "full", max_new: int = 50) -> str:
    """Return a text with what the model says next; an empty text lets it begin.

    Raises:
        SparqError: the text has letters of other scripts.
    """
    speechlm, network = load_model(model, precision)
    vocabulary = speechlm.vocabulary
    prompt = (*prompt_ids(vocabulary, "textlm"), *vocabulary.encode_text(normalize_text(text)))
    (ids,) = generate_targets(network, vocabulary, [prompt], max_new_tokens=max_new)
    return vocabulary.decode_text((*prompt, *ids))


def continue_audio(*, model: Path, file: Path, precision: str = "full", max_new: int = 50) -> str:
    """Return the units that the model puts after a recording's, separated by spaces.

    `sparq.recipes.speech_out.continue_speech` makes them audible.
    """
    speechlm, network = load_model(model, precision)
    vocabulary = speechlm.vocabulary
    (units,) = encode_recordings(speechlm, [file])
    prompt = (*prompt_ids(vocabulary, "speechlm"), *vocabulary.encode_units(units))
    (ids,) = generate_targets(network, vocabulary, [prompt], max_new_tokens=max_new)
    return " ".join(map(str, vocabulary.decode_units(ids)))
