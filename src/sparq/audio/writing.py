"""Waveforms to sound files that the user keeps."""

from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float32

from sparq.errors import SparqError
from sparq.files import atomic_path
from sparq.types import SAMPLE_RATE

_SUFFIX = ".wav"


def check_new_wav(path: str | Path) -> Path:
    """Return the path of a sound file to be written; called before long work, so that its result has a place.

    Raises:
        SparqError: something is there already, or the name does not end in `.wav`.
    """
    path = Path(path)
    if path.suffix.lower() != _SUFFIX:
        raise SparqError(f"cannot write {path}: the name must end in {_SUFFIX}")
    if path.exists():
        raise SparqError(f"{path} is there already: name another file or remove it")
    return path


def write_wav(path: str | Path, samples: Float32[np.ndarray, "samples"]) -> None:
    """Write mono 16 kHz samples as 16-bit WAV, whole or not at all.

    Samples beyond full scale would be clipped; then all are scaled down so that the largest has magnitude 1.

    Raises:
        SparqError: there is a file of that name, the name does not end in `.wav`, or the disk is full.
    """
    path = check_new_wav(path)
    peak = float(np.abs(samples).max(initial=0.0))
    with atomic_path(path) as temporary:
        soundfile.write(temporary, samples / max(1.0, peak), SAMPLE_RATE, subtype="PCM_16", format="WAV")
