"""Reading of audio ahead of its use, so that decoding and the extractor work at the same time."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

from sparq.audio.manifest import Utterance
from sparq.audio.waveform import read_waveform
from sparq.errors import SparqError
from sparq.types import Seconds

HOURS_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"
"""Format of a bar that counts hours; the rate comes as a postfix, in multiples of real time."""

_GROUP_SECONDS: Seconds = 3600.0


def group_utterances(utterances: Sequence[Utterance], size: int) -> list[list[Utterance]]:
    """Cut utterances, in order, into groups of at most `size` and at most an hour of speech.

    A longer utterance is a group of its own. The hour bounds the memory: its samples take 230 MB, its
    features of 384 numbers 280 MB.

    Raises:
        SparqError: an utterance has no split or no length, as in a manifest that was never prepared.
    """
    groups: list[list[Utterance]] = []
    seconds = 0.0
    for utterance in utterances:
        if not utterance.split or utterance.seconds <= 0:
            raise SparqError(
                f"utterance {utterance.id!r} has split {utterance.split!r} and {utterance.seconds} seconds: "
                "use the manifest that `sparq prepare` writes"
            )
        if not groups or len(groups[-1]) == size or seconds + utterance.seconds > _GROUP_SECONDS:
            groups.append([])
            seconds = 0.0
        groups[-1].append(utterance)
        seconds += utterance.seconds
    return groups


def read_groups(groups: Sequence[Sequence[Utterance]]) -> Iterator[list[Float32[np.ndarray, "_samples"]]]:
    """Yield the waveforms of each group, in order, while threads decode the next group.

    At most two groups are in memory. A file that cannot be read raises where its group is due.
    """
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        pending = [[pool.submit(read_waveform, u.path, segment=u.segment) for u in group] for group in groups[:1]]
        for _, upcoming in pairwise([*groups, ()]):
            current = pending.pop()
            pending.append([pool.submit(read_waveform, u.path, segment=u.segment) for u in upcoming])
            yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)
