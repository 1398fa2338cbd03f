"""Batches for training as a pure function of the seed and the update, so that a resumed run sees the same ones."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from sparq.errors import SparqError
from sparq.types import SAMPLE_RATE
from sparq.units import deduplicate
from sparq.vocoder.analysis import Recording
from sparq.vocoder.config import FRAME_HOP

_LATEST_START = 10_000  # frames, on the tape of noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Pieces of recordings, and whole runs of units for the durations.

    Attributes:
        units: one per frame.
        speaker: vector of each piece's recording.
        hertz: pitch.
        voiced: where it was heard.
        samples: what the pieces sound like.
        start: phase of the pulses, in cycles, any.
        first: place on the tape of noise, any.
        runs: units without repetition, padded.
        runs_speaker: vectors of their recordings.
        durations: frames of each; 1 in the padding.
        real: false in the padding.
    """

    units: Int64[Tensor, "batch frames"]
    speaker: Float[Tensor, "batch speaker_dim"]
    hertz: Float[Tensor, "batch frames"]
    voiced: Bool[Tensor, "batch frames"]
    samples: Float[Tensor, "batch samples"]
    start: Float64[Tensor, "batch"]
    first: Int64[Tensor, "batch"]
    runs: Int64[Tensor, "batch units"]
    runs_speaker: Float[Tensor, "batch speaker_dim"]
    durations: Int64[Tensor, "batch units"]
    real: Bool[Tensor, "batch units"]

    def share(self, part: int, parts: int) -> "Batch":
        """Return one of several parts: every `parts`-th piece, from number `part` on."""
        return self._map(lambda tensor: tensor[part::parts])

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: change(getattr(self, field.name)) for field in dataclasses.fields(self)})


class Crops:
    """Random pieces of equal length; each frame of the corpus is drawn equally often.

    Args:
        recordings: to draw from; those shorter than a piece are left out, and `num_short` counts them.
        frames: length of a piece.
        batch: pieces at a time.
        seed: decides all draws, together with the update.
        memory_hours: so much decoded audio is kept, 0.23 GB an hour; the rest is read again each time.

    Raises:
        SparqError: no recording is long enough.
    """

    def __init__(
        self, recordings: Sequence[Recording], *, frames: int, batch: int, seed: int, memory_hours: float = 0
    ) -> None:
        self._recordings = [r for r in recordings if len(r.units) >= frames]
        self.num_short = len(recordings) - len(self._recordings)
        if not self._recordings:
            raise SparqError(f"no training recording has {frames} frames: take shorter pieces or longer recordings")
        lengths = np.array([len(r.units) for r in self._recordings])
        self._shares = lengths / lengths.sum()
        self._frames, self._batch, self._seed = frames, batch, seed
        self._waveforms: dict[str, Float32[np.ndarray, _samples]] = {}
        self._num_held = 0
        self._most_held = round(memory_hours * 3600 * SAMPLE_RATE)

    def batch(self, update: int) -> Batch:
        """Return the batch of an update."""
        draw = np.random.default_rng([self._seed, update])
        chosen = [self._recordings[i] for i in draw.choice(len(self._shares), self._batch, p=self._shares)]
        firsts = [int(draw.integers(len(r.units) - self._frames + 1)) for r in chosen]
        pieces = [(r, slice(first, first + self._frames)) for r, first in zip(chosen, firsts, strict=True)]
        samples = [self._read(r)[s.start * FRAME_HOP : s.stop * FRAME_HOP] for r, s in pieces]
        runs = [deduplicate(r.units) for r in chosen]
        longest = max(len(units) for units, _ in runs)

        def padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
            return torch.from_numpy(
                np.stack([np.pad(row.astype(np.int64), (0, longest - len(row)), constant_values=value) for row in rows])
            )

        speaker = torch.from_numpy(np.stack([r.vector for r in chosen]))
        return Batch(
            units=torch.from_numpy(np.stack([r.units[s] for r, s in pieces]).astype(np.int64)),
            speaker=speaker,
            hertz=torch.from_numpy(np.stack([r.hertz[s] for r, s in pieces])),
            voiced=torch.from_numpy(np.stack([r.voiced[s] for r, s in pieces])),
            samples=torch.from_numpy(np.stack(samples)),
            start=torch.from_numpy(draw.random(self._batch)),
            first=torch.from_numpy(draw.integers(_LATEST_START, size=self._batch)),
            runs=padded([units for units, _ in runs], 0),
            runs_speaker=speaker,
            durations=padded([durations for _, durations in runs], 1),
            real=torch.arange(longest) < torch.tensor([[len(units)] for units, _ in runs]),
        )

    def _read(self, recording: Recording) -> Float32[np.ndarray, "samples"]:
        waveform = self._waveforms.get(recording.id)
        if waveform is None:
            waveform = recording.waveform()
            if self._num_held + len(waveform) <= self._most_held:
                self._waveforms[recording.id] = waveform
                self._num_held += len(waveform)
        return waveform

    def ahead(self, first: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of updates `first` to `stop - 1`; the next one is read while one is used."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.batch, first) if first < stop else None
            for update in range(first, stop):
                assert coming is not None
                batch = coming.result()
                coming = pool.submit(self.batch, update + 1) if update + 1 < stop else None
                yield batch
