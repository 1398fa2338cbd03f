"""Mel-frequency cepstral coefficients: features without any weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from sparq.types import SAMPLE_RATE

_HOP = 320
_FRAME = 400
_FFT = 512
_NUM_MELS = 23
_NUM_CEPSTRA = 13
_PREEMPHASIS = 0.97
_FLOOR = 1e-10
_DELTA_SPAN = 2


class MfccFeatures:
    """13 cepstra with first and second differences: 39 numbers, 50 times a second.

    Per frame of 25 ms: subtract the mean, pre-emphasize by 0.97, Hamming window, power spectrum, 23
    triangular mel bands from 20 Hz to 8 kHz, logarithm, orthonormal DCT-II (Kaldi's and HuBERT's recipe, Hsu
    et al. 2021, section 4.2, but with a hop of 20 ms). Differences are the regression slopes over 5 frames,
    d_t = sum_{n=1,2} n (c_{t+n} - c_{t-n}) / 10, with the edges repeated (Young et al., The HTK Book, section
    5.9).

    Frame i is centered on sample 320 i + 160, and a clip of s samples has ceil(s / 320) frames. Clips do not
    influence one another.
    """

    frame_rate = SAMPLE_RATE / _HOP
    dim = 3 * _NUM_CEPSTRA

    def __init__(self) -> None:
        self.fingerprint: dict[str, Any] = {"kind": "mfcc"}
        filters = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=_NUM_MELS,
            min_frequency=20.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
        self._filters = torch.from_numpy(filters).float()  # bins mels
        self._window = torch.hamming_window(_FRAME, periodic=False)
        self._dct = _dct_matrix(_NUM_MELS, _NUM_CEPSTRA)  # mels cepstra

    @torch.inference_mode()
    def extract(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[Float32[np.ndarray, "_frames dim"]]:
        """Return the features of each clip, in order."""
        return [self._one(torch.from_numpy(w)).numpy() for w in waveforms]

    def _one(self, samples: Float32[Tensor, "samples"]) -> Float32[Tensor, "frames dim"]:
        count = math.ceil(len(samples) / _HOP)
        if count == 0:
            return torch.empty(0, self.dim)
        before = (_FRAME - _HOP) // 2
        after = (count - 1) * _HOP + _FRAME - before - len(samples)
        frames = torch.nn.functional.pad(samples, (before, after)).unfold(0, _FRAME, _HOP)
        frames = frames - frames.mean(dim=1, keepdim=True)
        previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - _PREEMPHASIS * previous) * self._window
        power = torch.fft.rfft(frames, n=_FFT).abs().square()  # frames bins
        cepstra = (power @ self._filters).clamp(min=_FLOOR).log() @ self._dct
        slopes = _slopes(cepstra)
        return torch.cat([cepstra, slopes, _slopes(slopes)], dim=1)


def _slopes(values: Float[Tensor, "frames dim"]) -> Float[Tensor, "frames dim"]:
    count = len(values)
    padded = torch.cat([values[:1].expand(_DELTA_SPAN, -1), values, values[-1:].expand(_DELTA_SPAN, -1)])
    total = torch.zeros_like(values)
    for n in range(1, _DELTA_SPAN + 1):
        ahead = padded[_DELTA_SPAN + n : _DELTA_SPAN + n + count]
        behind = padded[_DELTA_SPAN - n : _DELTA_SPAN - n + count]
        total += n * (ahead - behind)
    return total / (2 * sum(n * n for n in range(1, _DELTA_SPAN + 1)))


def _dct_matrix(inputs: int, outputs: int) -> Float[Tensor, "inputs outputs"]:
    """Orthonormal DCT-II as a matrix to multiply from the right."""
    positions = torch.arange(inputs, dtype=torch.float64)[:, None] + 0.5
    matrix = torch.cos(math.pi / inputs * positions * torch.arange(outputs, dtype=torch.float64))
    matrix *= math.sqrt(2 / inputs)
    matrix[:, 0] /= math.sqrt(2)
    return matrix.float()
