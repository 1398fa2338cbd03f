"""Speech while its units are still coming, sample for sample that of the whole utterance.

A frame's samples depend on a known number of frames on each side, its context. A piece is made from its frames and
their context, of which the samples are thrown away; pulses go on from the phase where the piece before left off.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sparq.vocoder.config import FRAME_HOP
from sparq.vocoder.duration import DurationPredictor, whole_frames
from sparq.vocoder.excitation import frame_increments
from sparq.vocoder.hifigan import HifiGanGenerator
from sparq.vocoder.light import LightGenerator

CHUNK_FRAMES = 25
"""Half a second: the least that is worth the context computed around it."""


class FrameStream:
    """Frames in, samples out.

    Args:
        generator: makes the samples.
        speaker: vector of the voice.
        chunk: frames of a piece.
    """

    def __init__(
        self,
        generator: LightGenerator | HifiGanGenerator,
        speaker: Float[Tensor, "speaker_dim"],
        *,
        chunk: int = CHUNK_FRAMES,
    ) -> None:
        self._generator, self._speaker, self._chunk = generator, speaker[None], chunk
        self._units: list[int] = []
        self._done = 0
        self._starts = [0.0]  # phase at which each frame begins, as far as it is known

    @property
    def lookahead(self) -> int:
        """Frames behind a piece that must be known to make it."""
        generator = self._generator
        rendering = generator.render_context if isinstance(generator, LightGenerator) else 0
        return generator.network_context + rendering

    def push(self, units: Sequence[int]) -> Iterator[Float32[np.ndarray, "samples"]]:
        """Take more frames; yield the samples of each piece that is certain now."""
        self._units += units
        while len(self._units) >= self._done + self._chunk + self.lookahead:
            yield self._piece(self._done + self._chunk)

    def finish(self) -> Iterator[Float32[np.ndarray, "samples"]]:
        """Yield what is left, in pieces; no frames follow."""
        while self._done < len(self._units):
            yield self._piece(min(self._done + self._chunk, len(self._units)))

    @torch.inference_mode()
    def _piece(self, stop: int) -> Float32[np.ndarray, "samples"]:
        generator, first = self._generator, self._done
        self._done = stop
        if isinstance(generator, LightGenerator):
            margin = generator.render_context
            low, high = max(0, first - margin), min(len(self._units), stop + margin)
            samples = self._render(generator, low, high)
        else:
            low, high = self._widened(first, stop)
            samples = generator(self._ids(low, high), self._speaker)
        return samples[0, (first - low) * FRAME_HOP : (stop - low) * FRAME_HOP].numpy()

    def _render(self, generator: LightGenerator, low: int, high: int) -> Float[Tensor, "1 samples"]:
        left, right = self._widened(low, high)
        controls = generator.controls(self._ids(left, right), self._speaker)
        per_frame = controls.filters.shape[2] // (right - left)
        controls = controls._replace(
            hertz=controls.hertz[:, low - left : high - left],
            filters=controls.filters[:, :, (low - left) * per_frame : (high - left) * per_frame],
        )
        # At the window's edges a step lacks its neighbor; those frames are context, or the utterance's own edge.
        steps = frame_increments(controls.hertz)[0].tolist()
        while len(self._starts) < high:
            self._starts.append(self._starts[-1] + steps[len(self._starts) - 1 - low])
        starts = torch.tensor([self._starts[low:high]], dtype=torch.float64)
        return generator.render(controls, starts=starts, first=torch.tensor([low]))

    def _widened(self, first: int, stop: int) -> tuple[int, int]:
        context = self._generator.network_context
        return max(0, first - context), min(len(self._units), stop + context)

    def _ids(self, first: int, stop: int) -> Tensor:
        return torch.tensor([self._units[first:stop]])


class DurationStream:
    """Units without repetition in, frames out: each unit as often as it is predicted to last."""

    def __init__(self, predictor: DurationPredictor, speaker: Float[Tensor, "speaker_dim"]) -> None:
        self._predictor, self._speaker = predictor, speaker
        self._units: list[int] = []
        self._done = 0
        self._length = 0.0  # frames of the units done, not rounded

    def push(self, units: Sequence[int]) -> list[int]:
        """Take more units; return the frames that are certain now."""
        self._units += units
        return self._frames(len(self._units) - self._predictor.context)

    def finish(self) -> list[int]:
        """Return what is left; no units follow."""
        return self._frames(len(self._units))

    @torch.inference_mode()
    def _frames(self, stop: int) -> list[int]:
        if stop <= self._done:
            return []
        low, high = max(0, self._done - self._predictor.context), stop + self._predictor.context
        lengths = self._predictor.frames(torch.tensor(self._units[low:high]), self._speaker)
        lengths = lengths[self._done - low : stop - low]
        counts = whole_frames(lengths, before=self._length).tolist()
        self._length += float(lengths.double().sum())
        frames = [unit for unit, n in zip(self._units[self._done : stop], counts, strict=True) for _ in range(n)]
        self._done = stop
        return frames


def stream_speech(
    units: Iterable[Sequence[int]], frames: FrameStream, durations: DurationStream | None
) -> Iterator[Float32[np.ndarray, "samples"]]:
    """Turn portions of units into pieces of speech as soon as they are certain.

    Args:
        units: portions, as they become known.
        frames: makes the samples.
        durations: says how long units last; None if there is one unit for each frame.
    """
    for portion in units:
        yield from frames.push(list(portion) if durations is None else durations.push(portion))
    if durations is not None:
        yield from frames.push(durations.finish())
    yield from frames.finish()
