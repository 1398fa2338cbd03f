"""Spectra that losses and scores compare."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from sparq.types import SAMPLE_RATE


def magnitudes(samples: Float[Tensor, "batch samples"], *, size: int, hop: int) -> Float[Tensor, "batch bins frames"]:
    """Return the magnitudes of a short-time Fourier transform with a Hann window, without padding."""
    window = torch.hann_window(size, device=samples.device)
    spectrum = torch.stft(samples, size, hop, window=window, center=False, return_complex=True)
    # The gradient of abs() at 0 is undefined.
    power = spectrum.real.square() + spectrum.imag.square()
    return (power + 1e-9).sqrt()


def log_bands(spectrum: Float[Tensor, "batch bins frames"], *, num_mels: int) -> Float[Tensor, "batch mels frames"]:
    """Return the natural logarithm of mel bands up to 8 kHz of magnitudes, floored at 1e-5 (HiFi-GAN's)."""
    filters = _filters(2 * (spectrum.shape[1] - 1), num_mels).to(spectrum.device)
    return (filters @ spectrum).clamp(min=1e-5).log()


def power_bands(
    samples: Float[Tensor, "batch samples"], *, size: int, hop: int, num_mels: int
) -> Float[Tensor, "batch mels frames"]:
    """Return mel bands of powers; windows are centered every `hop` samples, ends are mirrored, the last is dropped."""
    window = torch.hann_window(size, device=samples.device)
    spectrum = torch.stft(samples, size, hop, window=window, return_complex=True)[..., :-1]
    return _filters(size, num_mels).to(samples.device) @ (spectrum.real.square() + spectrum.imag.square())


def log_mel(samples: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch 80 frames"]:
    """Return 80 log-mel bands of windows of 1024 samples every 256, as HiFi-GAN does."""
    return log_bands(magnitudes(samples, size=1024, hop=256), num_mels=80)


@lru_cache(maxsize=16)
def _filters(size: int, num_mels: int) -> Float[Tensor, "mels bins"]:
    filters = mel_filter_bank(
        num_frequency_bins=size // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().T.contiguous()
