"""Whether our results agree with the papers' claim, that their attention loses less: differences over seeds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from sparq.papers.experiments import OURS, Cell, Experiment
from sparq.papers.records import Record
from sparq.report.drop import average_drop

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 0.975 by degrees of freedom; beyond 9 the last one is used, which is a little too wide."""

Verdict = Literal["agrees", "disagrees", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """By how much the average drop of an outlier-free model is below that of vanilla, everything else equal.

    Attributes:
        cell: the outlier-free model.
        points: the mean over seeds of vanilla's drop less its drop, in points of percent; each over its own base.
        interval: half of the 95 % confidence interval (Student's t); None for a single seed.
        seeds: how many seeds.
    """

    cell: Cell
    points: float
    interval: float | None
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies above 0, where the papers say it is, below 0, or holds 0 or is not known."""
        if self.interval is None or not math.isfinite(self.points) or abs(self.points) <= self.interval:
            return "undecided"
        return "agrees" if self.points > 0 else "disagrees"


def compare_with_vanilla(experiment: Experiment, records: Iterable[Record]) -> list[Comparison]:
    """Return the comparisons that an experiment's records allow, for every outlier-free model that has a drop."""
    rows = {(r.cell, r.seed): r for r in records if r.measure == "tasks"}
    seeds = sorted({seed for _, seed in rows})
    found = []
    for cell in experiment.all_cells:
        if cell.framework not in OURS or cell == experiment.base(cell):
            continue
        twin = Cell(framework="vanilla", adaptation=cell.adaptation, rank=cell.rank, precision=cell.precision)
        pairs = [tuple(_drop(experiment, rows, which, seed) for which in (twin, cell)) for seed in seeds]
        differences = [theirs - own for theirs, own in pairs if theirs is not None and own is not None]
        if differences:
            found.append(
                Comparison(
                    cell=cell, points=fmean(differences), interval=_interval(differences), seeds=len(differences)
                )
            )
    return found


def _drop(experiment: Experiment, rows: dict[tuple[Cell, int], Record], cell: Cell, seed: int) -> float | None:
    row, base = rows.get((cell, seed)), rows.get((experiment.base(cell), seed))
    if row is None or base is None:
        return None
    return average_drop(row.values, base.values).percent


def _interval(differences: list[float]) -> float | None:
    count = len(differences)
    if count < 2 or not all(math.isfinite(value) for value in differences):
        return None
    return _T[min(count - 1, max(_T))] * stdev(differences) / math.sqrt(count)
