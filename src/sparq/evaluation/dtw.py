"""Dynamic time warping of many pairs at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Integer

# A step is (cost << 16) + 1, with the cost in steps of 2^-24: the least sum of steps is then the least cost and, of
# equally cheap paths, the shortest. Sums of whole numbers have no order, so ties are ties.
_ONE = 1 << 24
_LENGTH_BITS = 16
_UNREACHED = np.int64(1 << 62)
_CELLS = 40_000
"""Cells of an anti-diagonal over a batch: three of them stay in the processor's cache."""


def dtw_distances(
    sequences: Sequence[Integer[np.ndarray, "_frames"]],
    pairs: Integer[np.ndarray, "pairs 2"],
    distances: Float[np.ndarray, "units units"],
) -> Float64[np.ndarray, "pairs"]:
    """Return the mean cost along the best alignment of each pair of sequences.

    A path goes from the first frames of both to the last ones by steps of one frame in one or in both (Sakoe and Chiba
    1978, all weights 1). The best one has the least sum of distances; of several, the shortest. Its sum is divided by
    its length, the number of its cells. Libri-light (Kahn et al. 2020) does the same, but of the cheapest paths takes
    one that depends on which sequence is x; here d(x, y) = d(y, x).

    All pairs of a batch advance together along anti-diagonals, whose cells need only the two before:

        D(i, j) = d(x_i, y_j) + min(D(i-1, j), D(i, j-1), D(i-1, j-1))

    Args:
        sequences: units of frames, at least one frame each.
        pairs: indices of two sequences.
        distances: of two units, 0 to 1; rounded to multiples of 2^-24.
    """
    assert distances.min() >= 0, "negative distance"
    assert distances.max() <= 1, "a distance above 1"
    lengths = np.array([len(sequence) for sequence in sequences])
    assert lengths.min() > 0, "empty sequence"
    assert 2 * lengths.max() < 1 << _LENGTH_BITS, "a sequence is too long"
    frames = np.concatenate(sequences).astype(np.intp)
    starts = np.cumsum(lengths) - lengths
    steps = ((np.rint(distances * _ONE).astype(np.int64) << _LENGTH_BITS) + 1).ravel()
    x, y = pairs.T
    longest = np.maximum(lengths[x], lengths[y])
    order = np.lexsort((lengths[y], lengths[x], longest))[::-1]
    means = np.empty(len(pairs))
    first = 0
    while first < len(order):
        batch = order[first : first + max(1, _CELLS // int(longest[order[first]]))]
        # Side by side (frames pairs); the shorter ones repeat their last frame, which no result depends on.
        rows, columns = (
            frames[starts[side] + np.minimum(np.arange(lengths[side].max())[:, None], lengths[side] - 1)]
            for side in (x[batch], y[batch])
        )
        sums = _least_sums(rows * len(distances), columns, lengths[x[batch]], lengths[y[batch]], steps)
        means[batch] = (sums >> _LENGTH_BITS) / ((sums & ((1 << _LENGTH_BITS) - 1)) * _ONE)
        first += len(batch)
    return means


def _least_sums(
    rows: Integer[np.ndarray, "rows pairs"],
    columns: Integer[np.ndarray, "columns pairs"],
    num_rows: Integer[np.ndarray, "pairs"],
    num_columns: Integer[np.ndarray, "pairs"],
    steps: Integer[np.ndarray, "table"],
) -> Integer[np.ndarray, "pairs"]:
    """Return the least sum of steps of each pair; a step is at `row + column` of the table."""
    # Row i of a diagonal is at i + 1; no path comes from outside, but for the first cell, diagonally.
    before, last, current = (np.full((len(rows) + 1, rows.shape[1]), _UNREACHED) for _ in range(3))
    before[0] = 0
    sums = np.empty(rows.shape[1], np.int64)
    end = num_rows + num_columns - 2
    for diagonal in range(len(rows) + len(columns) - 1):
        low, high = max(0, diagonal - len(columns) + 1), min(len(rows), diagonal + 1)
        best = np.minimum(last[low:high], last[low + 1 : high + 1])  # rows pairs
        np.minimum(best, before[low:high], out=best)
        step = steps.take(rows[low:high] + columns[diagonal - high + 1 : diagonal - low + 1][::-1])
        np.add(best, step, out=current[low + 1 : high + 1])
        (ended,) = np.nonzero(end == diagonal)
        sums[ended] = current[num_rows[ended], ended]
        before[0] = _UNREACHED
        before, last, current = last, current, before
    return sums
