"""Fundamental frequency by YIN (de Cheveigné & Kawahara 2002), one value for each unit frame."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from sparq.types import SAMPLE_RATE
from sparq.vocoder.config import FRAME_HOP

MIN_HZ, MAX_HZ = 62.5, 500.0
DEFAULT_HZ = 120.0
"""Of a clip without any voiced frame."""

_WINDOW = 512
_LONGEST = round(SAMPLE_RATE / MIN_HZ)
_SHORTEST = round(SAMPLE_RATE / MAX_HZ)
_THRESHOLD = 0.15
_VOICED = 0.4
_OCTAVES = 0.8
_QUIET = 1e-3  # -60 dB below the loudest frame's root mean square
_SMOOTHING = 5
_FRAMES_PER_CHUNK = 4096


def track_pitch(
    waveform: Float32[np.ndarray, "samples"],
) -> tuple[Float32[np.ndarray, "frames"], Bool[np.ndarray, "frames"]]:
    """Return the pitch of each frame in Hz, and where it was heard.

    With d(t) the squared difference of a window and the window t samples later, the period is the first local
    minimum of d(t) * t / sum_{1..t} d below 0.15, else the lowest minimum, refined by a parabola. A frame is voiced if
    that minimum is below 0.4, the frame is not silent, and the pitch is within 0.8 octaves of the clip's median. Voiced
    values go through a median over 5 frames; between voiced stretches the logarithm is interpolated, so that the
    contour has no gaps.

    Frame i is centered on sample 320 i + 160; a clip of s samples has ceil(s / 320) frames.
    """
    num_frames = -(-len(waveform) // FRAME_HOP)
    span = _WINDOW + _LONGEST
    before = (span - FRAME_HOP) // 2
    padded = np.zeros((num_frames - 1) * FRAME_HOP + span, np.float32)
    kept = waveform[: len(padded) - before]
    padded[before : before + len(kept)] = kept
    frames = torch.from_numpy(padded).unfold(0, span, FRAME_HOP)
    periods = map(_yin, torch.split(frames, _FRAMES_PER_CHUNK))
    hertz, depth = (torch.cat(parts).numpy() for parts in zip(*periods, strict=True))
    loudness = frames.square().mean(dim=1).sqrt().numpy()
    voiced = (depth < _VOICED) & (loudness > _QUIET * loudness.max())
    if voiced.any():
        usual = np.median(hertz[voiced])
        voiced &= np.abs(np.log2(hertz / usual)) < _OCTAVES
    return _contour(hertz, voiced), voiced


def _yin(frames: Float[Tensor, "frames span"]) -> tuple[Float[Tensor, "frames"], Float[Tensor, "frames"]]:
    """Return the pitch in Hz and the value of the normalized difference there."""
    frames = frames.double()
    size = 2 * frames.shape[1]
    spectrum = torch.fft.rfft(frames, size)
    head = torch.fft.rfft(frames[:, :_WINDOW], size)
    products = torch.fft.irfft(spectrum * head.conj(), size)[:, : _LONGEST + 1]
    energy = torch.nn.functional.pad(frames.square().cumsum(dim=1), (1, 0))
    later = energy[:, _WINDOW : _WINDOW + _LONGEST + 1] - energy[:, : _LONGEST + 1]
    difference = (later[:, :1] + later - 2 * products).clamp(min=0)  # frames lags, lag 0 first
    lags = torch.arange(_LONGEST + 1, dtype=torch.float64)
    normalized = difference * lags / difference.cumsum(dim=1).clamp(min=1e-12)
    normalized[:, 0] = 1
    normalized[difference.sum(dim=1) <= 1e-9] = 1  # silence has no period
    inside = normalized[:, _SHORTEST:_LONGEST]
    is_minimum = (inside <= normalized[:, _SHORTEST - 1 : _LONGEST - 1]) & (inside < normalized[:, _SHORTEST + 1 :])
    good = is_minimum & (inside < _THRESHOLD)
    lag = torch.where(good.any(dim=1), good.int().argmax(dim=1), inside.argmin(dim=1)) + _SHORTEST
    left, middle, right = (normalized.gather(1, (lag + k)[:, None])[:, 0] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = torch.where(bend > 1e-12, 0.5 * (left - right) / bend.clamp(min=1e-12), 0.0).clamp(-0.5, 0.5)
    return (SAMPLE_RATE / (lag + shift)).float(), middle.float()


def _contour(hertz: Float32[np.ndarray, "frames"], voiced: Bool[np.ndarray, "frames"]) -> Float32[np.ndarray, "frames"]:
    where = np.flatnonzero(voiced)
    if not len(where):
        return np.full(len(hertz), DEFAULT_HZ, np.float32)
    values = np.pad(np.log(hertz[where]), _SMOOTHING // 2, mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, _SMOOTHING), axis=1)
    contour: np.ndarray = np.exp(np.interp(np.arange(len(hertz)), where, smooth)).astype(np.float32)
    return contour
