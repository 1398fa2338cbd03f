"""What training needs of each recording beside its units: pitch, and the vector of its speaker. Computed once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt16
from safetensors import safe_open
from safetensors.numpy import save

from sparq.audio import Utterance, read_waveform
from sparq.audio.waveform import Segment
from sparq.errors import SparqError
from sparq.files import atomic_path, fingerprint
from sparq.progress import progress
from sparq.units import UnitUtterance, expand
from sparq.vocoder.config import FRAME_HOP
from sparq.vocoder.pitch import track_pitch
from sparq.vocoder.speaker import SpeakerEncoder

_CLIPS_PER_BATCH = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A recording as a vocoder sees it.

    Attributes:
        id: as in the manifest.
        path: the sound file.
        segment: the part of the file, or None for the whole.
        speaker: as in the manifest.
        text: as in the manifest.
        units: one unit per frame.
        hertz: pitch of each frame, without gaps.
        voiced: where the pitch was heard.
        vector: who speaks.
    """

    id: str
    path: Path
    segment: Segment | None = None
    speaker: str
    text: str
    units: UInt16[np.ndarray, "frames"]
    hertz: Float32[np.ndarray, "frames"]
    voiced: Bool[np.ndarray, "frames"]
    vector: Float32[np.ndarray, "speaker_dim"]

    def waveform(self) -> Float32[np.ndarray, "samples"]:
        """Read the samples, 320 for each unit: silence is added, or a rest without a unit is cut."""
        return fit_to_frames(read_waveform(self.path, segment=self.segment), len(self.units))


def fit_to_frames(waveform: Float32[np.ndarray, "samples"], num_frames: int) -> Float32[np.ndarray, "fitted"]:
    """Return exactly `320 * num_frames` samples from the first on."""
    fitted = np.zeros(num_frames * FRAME_HOP, np.float32)
    kept = waveform[: len(fitted)]
    fitted[: len(kept)] = kept
    return fitted


def analyze(
    utterances: Sequence[Utterance],
    units: Sequence[UnitUtterance],
    encoder: SpeakerEncoder,
    cache: Path,
    *,
    label: str,
) -> list[Recording]:
    """Return the recordings of a split; what was computed before is read from `cache`.

    Args:
        utterances: the manifest's, in which the files are named.
        units: the same recordings, encoded.
        encoder: makes the speaker vectors.
        cache: a safetensors file, written if it is not there or is of other recordings or another encoder.
        label: of the progress bar.

    Raises:
        SparqError: units without a recording in the manifest, or a recording that cannot be read.
    """
    spoken = {utterance.id: utterance for utterance in utterances}
    missing = [row.id for row in units if row.id not in spoken]
    if missing:
        raise SparqError(
            f"units of {missing[0]!r} have no recording in the manifest: use units and manifest of one run"
        )
    frames = [expand(row.units, row.durations) for row in units]
    key = fingerprint(encoder.fingerprint, [(row.id, len(f)) for row, f in zip(units, frames, strict=True)])
    found = _read(cache, key)
    if found is None:
        found = _compute([spoken[row.id] for row in units], [len(f) for f in frames], encoder, label)
        with atomic_path(cache) as temporary:
            temporary.write_bytes(save(found, metadata={"sparq": json.dumps({"key": key})}))
    ends = np.cumsum([len(f) for f in frames])[:-1]
    hertz, voiced = (np.split(found[name], ends) for name in ("hertz", "voiced"))
    return [
        Recording(
            id=row.id, path=spoken[row.id].path, segment=spoken[row.id].segment,
            speaker=row.speaker, text=row.text, units=f, hertz=h, voiced=v.astype(bool),
            vector=vector,
        )
        for row, f, h, v, vector in zip(units, frames, hertz, voiced, found["vectors"], strict=True)
    ]  # fmt: skip


def _compute(
    utterances: Sequence[Utterance], lengths: Sequence[int], encoder: SpeakerEncoder, label: str
) -> dict[str, np.ndarray]:
    hertz, voiced, vectors = [], [], []
    with progress(label, total=len(utterances), unit="clip") as bar:
        for first in range(0, len(utterances), _CLIPS_PER_BATCH):
            batch = slice(first, first + _CLIPS_PER_BATCH)
            clips = [
                fit_to_frames(read_waveform(u.path, segment=u.segment), n)
                for u, n in zip(utterances[batch], lengths[batch], strict=True)
            ]
            vectors.append(encoder.embed(clips))
            for clip in clips:
                pitch, heard = track_pitch(clip)
                hertz.append(pitch)
                voiced.append(heard)
            bar.update(len(clips))
    return {
        "hertz": np.concatenate(hertz),
        "voiced": np.concatenate(voiced).astype(np.uint8),
        "vectors": np.concatenate(vectors),
    }


def _read(cache: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return what is cached under a key, or None if nothing is."""
    if not cache.exists():
        return None
    with safe_open(cache, framework="numpy") as file:
        if json.loads((file.metadata() or {}).get("sparq", "{}")).get("key") != key:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
