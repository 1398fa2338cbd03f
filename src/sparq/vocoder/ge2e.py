"""The built-in speaker encoder: an LSTM over mel bands, trained to tell speakers apart (Wan et al. 2018, GE2E).

The weights are those of Resemblyzer (`pretrained:voice-encoder`): three layers of 256 cells over 40 mel bands, whose
last state is projected, rectified and set to length 1. A clip's vector is the mean over windows of 1.6 s, again of
length 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from sparq.files import sha256_file
from sparq.pretrained import pretrained_folder
from sparq.types import SAMPLE_RATE

_DIM = 256
_MELS = 40
_FFT, _HOP = 400, 160
_WINDOW = 160  # mel frames, 1.6 s
_STEP = 77  # mel frames between windows: 1.3 a second
_COVERED = 0.75  # share of the last window that must be speech, unless it is the only one
_LEVEL = 10 ** (-30 / 20)
_WINDOWS_PER_BATCH = 64


class Ge2eEncoder(nn.Module):
    """Waveforms to speaker vectors; follows `sparq.vocoder.speaker.SpeakerEncoder`."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(_MELS, _DIM, num_layers=3, batch_first=True)
        self.linear = nn.Linear(_DIM, _DIM)
        filters = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=_MELS,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.dim = _DIM
        self.fingerprint = ""

    def forward(self, mels: Float[Tensor, "windows frames 40"]) -> Float[Tensor, "windows 256"]:
        """Return a vector of length 1 for each window of mel bands (powers, not logarithms)."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> Float32[np.ndarray, "clips 256"]:
        """Return the vector of each clip.

        Quiet clips are raised to -30 dB of full scale first. Unlike in Resemblyzer, pauses are not cut out.
        """
        windows = [self._windows(torch.from_numpy(waveform)) for waveform in waveforms]
        stacked = torch.cat(windows)
        vectors = torch.cat([self(part) for part in torch.split(stacked, _WINDOWS_PER_BATCH)])
        means = [part.mean(dim=0) for part in torch.split(vectors, [len(w) for w in windows])]
        return nn.functional.normalize(torch.stack(means), dim=1).numpy()

    def _windows(self, samples: Float[Tensor, "samples"]) -> Float[Tensor, "windows frames 40"]:
        level = samples.square().mean().sqrt().clamp(min=1e-6)
        samples = samples * (_LEVEL / level).clamp(min=1)
        num_frames = len(samples) // _HOP + 1
        count = max(1, 1 + -(-(num_frames - _WINDOW) // _STEP))
        # The last window may hang over the end; it counts if three quarters of it are speech.
        if count > 1 and num_frames - (count - 1) * _STEP < _COVERED * _WINDOW:
            count -= 1
        needed = ((count - 1) * _STEP + _WINDOW) * _HOP
        samples = nn.functional.pad(samples, (0, max(0, needed - len(samples))))
        window = torch.hann_window(_FFT)
        spectrum = torch.stft(samples, _FFT, _HOP, window=window, center=True, pad_mode="constant", return_complex=True)
        mels = (spectrum.abs().square().T @ self.filters)[: (count - 1) * _STEP + _WINDOW]
        return mels.unfold(0, _WINDOW, _STEP).transpose(1, 2)  # windows frames mels


def load_ge2e(cache: Path | None = None) -> Ge2eEncoder:
    """Load `pretrained:voice-encoder`; the first use downloads its wheel.

    Raises:
        SparqError: the download fails or the cached files are damaged.
    """
    file = pretrained_folder("voice-encoder", cache) / "model.safetensors"
    encoder = Ge2eEncoder()
    encoder.load_state_dict(load_file(file))
    encoder.fingerprint = sha256_file(file)[:16]
    return encoder.eval().requires_grad_(False)
