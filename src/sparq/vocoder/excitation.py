"""What a voice is made of before the mouth shapes it: pulses at the pitch, and noise.

Both are functions of absolute time, so that any piece of an utterance can be made by itself: pulses from the phase at
its first frame, noise from its place on an endless tape.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sparq.types import SAMPLE_RATE
from sparq.vocoder.config import FRAME_HOP

_TAPE = 2**18  # 16 seconds, then it repeats
_TAPE_SEED = 320


def frame_increments(
    hertz: Float[Tensor, "batch frames"],
) -> Float64[Tensor, "batch frames"]:
    """Return by how many cycles the phase advances within each frame.

    Pitch is interpolated linearly between the centers of frames, so with f the pitch at the centers a frame's
    320 samples sum up to 40 f_{i-1} + 240 f_i + 40 f_{i+1}; the first and last value are held.
    """
    before, after = _neighbors(hertz.double())
    return (40 * before + 240 * hertz.double() + 40 * after) / SAMPLE_RATE


def frame_starts(
    hertz: Float[Tensor, "batch frames"], start: Float64[Tensor, "batch"]
) -> Float64[Tensor, "batch frames"]:
    """Return the phase, in cycles, at which each frame begins; the first one at `start`."""
    steps = frame_increments(hertz)
    return start[:, None] + steps.cumsum(dim=1) - steps


def pulses(
    hertz: Float[Tensor, "batch frames"], starts: Float64[Tensor, "batch frames"]
) -> Float[Tensor, "batch samples"]:
    """Return a train of band-limited pulses of power 1.

    x(n) = sqrt(2 / (K - 1 + w)) (sum_{k < K} cos(2 pi k p(n)) + w cos(2 pi K p(n))), with p the phase in cycles, K the
    number of harmonics below 8 kHz and w = 8000 / f - K, so that no harmonic comes or goes at once. The sum is
    Dirichlet's kernel.

    Args:
        hertz: pitch at the center of each frame.
        starts: phase in cycles at each frame's start.
    """
    before, after = _neighbors(hertz)
    place = (torch.arange(FRAME_HOP, device=hertz.device) + 0.5) / FRAME_HOP - 0.5
    local = hertz[..., None] * (1 - place.abs()) + before[..., None] * (-place).clamp(min=0)
    local = local + after[..., None] * place.clamp(min=0)  # batch frames hop: Hz at each sample
    phase = ((starts % 1.0).float()[..., None] + (local / SAMPLE_RATE).cumsum(dim=-1)) % 1.0
    harmonics = SAMPLE_RATE / 2 / local
    count = torch.floor(harmonics)
    last = harmonics - count
    angle = torch.pi * phase
    sine = angle.sin()
    close = sine.abs() < 1e-4
    ratio = ((2 * count - 1) * angle).sin() / torch.where(close, 1.0, sine)
    total = torch.where(close, count - 1, (ratio - 1) / 2) + last * (2 * count * angle).cos()
    return (total * (2 / (count - 1 + last)).sqrt()).flatten(1)  # batch samples


def noise(first: Int64[Tensor, "batch"], num_frames: int) -> Float[Tensor, "batch samples"]:
    """Return Gaussian noise of power 1 for frames `first`, `first + 1`, ... of a clip."""
    places = first[:, None] * FRAME_HOP + torch.arange(num_frames * FRAME_HOP, device=first.device)
    return _tape().to(first.device)[places % _TAPE]


@lru_cache(maxsize=1)
def _tape() -> Float[Tensor, "samples"]:
    return torch.randn(_TAPE, generator=torch.Generator().manual_seed(_TAPE_SEED))


def _neighbors(
    values: Float[Tensor, "batch frames"],
) -> tuple[Float[Tensor, "batch frames"], Float[Tensor, "batch frames"]]:
    before = torch.cat([values[:, :1], values[:, :-1]], dim=1)
    after = torch.cat([values[:, 1:], values[:, -1:]], dim=1)
    return before, after
