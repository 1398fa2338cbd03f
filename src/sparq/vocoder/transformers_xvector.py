"""Speaker vectors by the x-vector models of transformers: a speech encoder with a TDNN on top.

The setting is SUPERB's (Yang et al. 2021); `microsoft/wavlm-base-plus-sv` is such a model. They need no package beyond
transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import UniSpeechSatForXVector, Wav2Vec2ForXVector, WavLMForXVector

from sparq.errors import unknown
from sparq.files import fingerprint
from sparq.types import SAMPLE_RATE
from sparq.units.checkpoint import hash_tensors, load_lower_part, read_config, read_preprocessor

MODEL_CLASSES = {
    "unispeech-sat": UniSpeechSatForXVector,
    "wav2vec2": Wav2Vec2ForXVector,
    "wavlm": WavLMForXVector,
}


class XVectorEncoder:
    """Waveforms to speaker vectors; follows `sparq.vocoder.speaker.SpeakerEncoder`.

    Clips go through one by one, because most of these encoders normalize over time.
    """

    def __init__(self, model: Any, preprocessor: Any) -> None:
        config = model.config
        self.dim: int = config.xvector_output_dim
        self.fingerprint = fingerprint(config.model_type, bool(preprocessor.do_normalize), hash_tensors(model))
        self._model, self._preprocessor = model, preprocessor
        self._shortest = _fewest_samples(config)

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> Float32[np.ndarray, "clips speaker_dim"]:
        """Return the vector of each clip; one that is too short for the convolutions is repeated until it is not."""
        vectors = torch.cat([self._vector(waveform) for waveform in waveforms])
        return nn.functional.normalize(vectors, dim=1).numpy()

    def _vector(self, waveform: Float32[np.ndarray, "samples"]) -> Float[Tensor, "1 speaker_dim"]:
        if len(waveform) < self._shortest:
            waveform = np.resize(waveform, self._shortest)  # repeats it
        prepared = self._preprocessor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        vector: Tensor = self._model(prepared.input_values).embeddings
        return vector


def load_xvector(folder: Path) -> XVectorEncoder:
    """Load a model `...ForXVector` of transformers from its safetensors; every tensor must fit.

    Raises:
        SparqError: the model is of another kind, or tensors are missing, unknown or misshapen.
    """
    config = read_config(str(folder))
    if config.model_type not in MODEL_CLASSES:
        raise unknown(f"kind of speaker encoder at {str(folder)!r}:", config.model_type, MODEL_CLASSES)
    model = load_lower_part(MODEL_CLASSES[config.model_type], str(folder), config, used="")
    return XVectorEncoder(model, read_preprocessor(str(folder)))


def _fewest_samples(config: Any) -> int:
    """Return the samples that leave two frames behind all convolutions: one has no standard deviation."""
    num: int = 2 + sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        num = (num - 1) * stride + kernel
    return num
