"""Batches of clips of unlike lengths."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise


def cut_evenly(frames: int, longest: int) -> list[tuple[int, int]]:
    """Cut a clip into the fewest (start, stop) pieces of at most `longest` frames, of nearly equal length.

    Equal pieces leave no short rest without context. No frames give no piece.
    """
    count = math.ceil(frames / longest)
    return list(pairwise(i * frames // count for i in range(count + 1))) if count else []


def length_sorted(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of indices of like lengths: at most `budget` frames after padding, or one clip.

    The batches depend on nothing but the arguments.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
