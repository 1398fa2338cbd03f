"""The choice of a feature extractor, and what all of them have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32

from sparq.devices import compute_device
from sparq.errors import SparqError, unknown
from sparq.units.checkpoint import read_config
from sparq.units.hubert import MODEL_CLASSES, load_hubert
from sparq.units.mfcc import MfccFeatures
from sparq.units.whisper import load_whisper

MFCC = "mfcc"
"""The model name that stands for cepstra, which need no weights."""

_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features to take.

    Attributes:
        model: "mfcc", or a Hugging Face folder or hub name of HuBERT, wav2vec 2.0, WavLM or Whisper.
        layer: the transformer layer whose output is taken, counted from 1 (HuBERT-base: 6, SpARQ section 4.1;
            Whisper-tiny: 2). None for "mfcc".
        dtype: of weights and activations, bfloat16 or float32. bfloat16 is several times faster on CPUs that
            have it.
    """

    model: str
    layer: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise unknown("feature dtype", self.dtype, _DTYPES)
        if self.model == MFCC and self.layer is not None:
            raise SparqError(f"layer {self.layer} of mfcc does not exist: leave the layer out")
        if self.model != MFCC and self.layer is None:
            raise SparqError(f"no layer given for the features of {self.model!r}: HuBERT-base takes 6")


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns clips into frames of features.

    Attributes:
        frame_rate: frames per second of speech.
        dim: numbers per frame.
        fingerprint: what decides the values: kind, layer, precision and the SHA-256 of the weights in use,
            never a path. Equal fingerprints mean exchangeable extractors.
    """

    frame_rate: float
    dim: int
    fingerprint: dict[str, Any]

    def extract(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[Float32[np.ndarray, "_frames dim"]]:
        """Return the features of each clip of 16 kHz mono samples, in order."""
        ...


def load_extractor(spec: FeatureSpec) -> FeatureExtractor:
    """Load the extractor that a spec describes; only the layers up to the wanted one are loaded and computed.

    Raises:
        SparqError: no such model or layer, a model of another kind, or a checkpoint that does not fit
            strictly.
    """
    if spec.model == MFCC:
        return MfccFeatures()
    assert spec.layer is not None
    config = read_config(spec.model)
    place: dict[str, Any] = {
        "layer": spec.layer,
        "dtype": _DTYPES[spec.dtype],
        "device": compute_device(),
    }
    if config.model_type == "whisper":
        return load_whisper(spec.model, config, **place)
    if config.model_type in MODEL_CLASSES:
        return load_hubert(spec.model, config, **place)
    raise unknown(f"kind of feature model at {spec.model!r}:", config.model_type, [*MODEL_CLASSES, "whisper"])


def describe(fingerprint: Mapping[str, Any]) -> str:
    """Return an extractor's fingerprint in words, for messages.

    >>> describe({"kind": "hubert", "layer": 6, "dtype": "float32", "weights": "0123456789abcdef"})
    'hubert layer 6 float32, weights 01234567'
    """
    words = [str(fingerprint.get("kind"))]
    if "layer" in fingerprint:
        words.append(f"layer {fingerprint['layer']}")
    if "dtype" in fingerprint:
        words.append(str(fingerprint["dtype"]))
    if "context" in fingerprint:
        words.append(f"by {fingerprint['context']}")
    weights = fingerprint.get("weights")
    return " ".join(words) + (f", weights {str(weights)[:8]}" if weights else "")
