"""Ratios of run times that a slow or busy machine does not bend: contenders take turns, and turns are compared."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The time of a contender by that of the baseline.

    Attributes:
        median: over the rounds.
        low: first quartile.
        high: third quartile.
        seconds: median time of one run of the contender.
    """

    median: float
    low: float
    high: float
    seconds: float


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int,
    least_seconds: float = 0.005,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """Run every contender once a round, in an order that turns, and compare within rounds.

    One round before the first is not counted; it tells how often the baseline has to run to take `least_seconds`, and
    so often every contender runs in its turn. The garbage collector is off meanwhile.

    Args:
        contenders: what to run; the baseline is one of them, and its own ratio says how steady the machine is: it is
            run twice a round and compared with itself.
        baseline: name of the one to compare with.
        rounds: how many rounds count, at least 3.
        least_seconds: a turn of the baseline takes at least about that long.
        synchronize: waits until a device is done.
        clock: tells seconds.
    """
    assert rounds >= 3, "quartiles need three rounds"
    runs = [*contenders.items(), (f"{baseline} again", contenders[baseline])]
    times: dict[str, list[float]] = {name: [] for name, _ in runs}
    repeats = 1
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            turn = number % len(runs)
            for name, run in runs[turn:] + runs[:turn]:
                synchronize()
                start = clock()
                for _ in range(repeats):
                    run()
                synchronize()
                times[name].append((clock() - start) / repeats)
            if number == 0:
                repeats = max(1, math.ceil(least_seconds / times[baseline][0]))
                for name, _ in runs:
                    times[name].clear()
    finally:
        if collecting:
            gc.enable()
    result = {}
    for name in contenders:
        own = times[f"{baseline} again" if name == baseline else name]
        ratios = [a / b for a, b in zip(own, times[baseline], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result[name] = Ratio(median=median, low=low, high=high, seconds=statistics.median(own))
    return result
