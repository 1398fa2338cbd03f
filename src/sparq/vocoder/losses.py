"""What a generator is trained by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparq.vocoder.spectra import log_bands, magnitudes

RESOLUTIONS = ((256, 64), (512, 128), (1024, 256), (2048, 512))
"""Window and hop, in samples, of the multi-resolution losses."""

_MELS = {256: 20, 512: 40, 1024: 80, 2048: 160}


class Distances(NamedTuple):
    """Two distances of waveforms; see `distances`."""

    mel: Float[Tensor, ""]
    spectral: Float[Tensor, ""]


def distances(made: Float[Tensor, "batch samples"], real: Float[Tensor, "batch samples"]) -> Distances:
    """Compare magnitudes S at several resolutions.

    `mel` is the mean over resolutions of the mean absolute difference of log-mel bands (Kumar et al. 2023, section
    3.4); `spectral` that of || S - S' || / || S || + mean | log S - log S' | (Yamamoto et al. 2020, section 2.2).
    """
    mel = spectral = made.new_zeros(())
    for size, hop in RESOLUTIONS:
        ours, theirs = (magnitudes(x, size=size, hop=hop) for x in (made, real))
        mel = mel + (log_bands(ours, num_mels=_MELS[size]) - log_bands(theirs, num_mels=_MELS[size])).abs().mean()
        spectral = spectral + torch.linalg.norm(theirs - ours) / torch.linalg.norm(theirs)
        spectral = spectral + (_log(ours) - _log(theirs)).abs().mean()
    return Distances(mel / len(RESOLUTIONS), spectral / len(RESOLUTIONS))


def _log(size: Tensor) -> Tensor:
    return size.clamp(min=1e-3).log()


def pitch_loss(
    predicted: Float[Tensor, "batch frames"],
    tracked: Float[Tensor, "batch frames"],
    voiced: Bool[Tensor, "batch frames"],
) -> Float[Tensor, ""]:
    """Return the mean absolute difference of log pitch over voiced frames, in octaves; 0 where none is voiced."""
    octaves = (predicted / tracked).log2().abs()
    return (octaves * voiced).sum() / voiced.sum().clamp(min=1)


def adversarial_loss(scores: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the generator's least-squares loss, sum over discriminators of mean (1 - D(made))^2 (HiFi-GAN, eq. 2)."""
    return torch.stack([(1 - score).square().mean() for score in scores]).sum()


def discriminator_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the sum over discriminators of mean (1 - D(real))^2 + mean D(made)^2 (HiFi-GAN, eq. 1)."""
    return torch.stack([(1 - r).square().mean() + m.square().mean() for r, m in zip(real, made, strict=True)]).sum()


def matching_loss(real: Sequence[Sequence[Tensor]], made: Sequence[Sequence[Tensor]]) -> Float[Tensor, ""]:
    """Return the sum over discriminators and layers of the mean absolute difference of features (HiFi-GAN, eq. 4)."""
    pairs = [
        nn.functional.l1_loss(m, r.detach()) for a, b in zip(real, made, strict=True) for r, m in zip(a, b, strict=True)
    ]
    return torch.stack(pairs).sum()
