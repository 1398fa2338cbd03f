"""Runs of equal units: written once, with their length in frames."""

import numpy as np
from jaxtyping import UInt16

_LONGEST = int(np.iinfo(np.uint16).max)


def deduplicate(
    units: UInt16[np.ndarray, "frames"],
) -> tuple[UInt16[np.ndarray, "units"], UInt16[np.ndarray, "units"]]:
    """Write each run of equal units once.

    `5 5 5 9 9 5` becomes units `5 9 5` with durations `3 2 1`; the durations add up to the number of frames.
    A run of more than 65535 frames (22 minutes at 50 Hz) is split, because a duration is an unsigned 16-bit
    number.

    Args:
        units: one unit per frame.

    Returns:
        The units without repetition, and the length of each run in frames.
    """
    if units.size == 0:
        return units.copy(), units.copy()
    starts = np.flatnonzero(np.concatenate([[True], units[1:] != units[:-1]]))
    lengths = np.diff(np.append(starts, units.size))
    if lengths.max() > _LONGEST:
        parts = [[_LONGEST] * ((n - 1) // _LONGEST) + [(n - 1) % _LONGEST + 1] for n in lengths.tolist()]
        starts = np.repeat(starts, [len(p) for p in parts])
        lengths = np.array([n for p in parts for n in p])
    return units[starts], lengths.astype(np.uint16)


def expand(units: UInt16[np.ndarray, "units"], durations: UInt16[np.ndarray, "units"]) -> UInt16[np.ndarray, "frames"]:
    """Return one unit per frame: the inverse of `deduplicate`."""
    return np.repeat(units, durations)
