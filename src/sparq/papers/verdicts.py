"""Whether our results agree with what the papers' tables say of two attentions: differences over seeds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from sparq.papers.experiments import Cell, Experiment
from sparq.papers.published import Published, PublishedRow, PublishedTable, recompute, recompute_metric
from sparq.papers.records import Record
from sparq.papers.theirs import find_row, models_of
from sparq.report.drop import average_drop

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 0.975 by degrees of freedom; beyond 9 the last one is used, which is a little too wide."""

Verdict = Literal["agrees", "disagrees", "smaller", "undecided"]
Values = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """By how much a model is better than one with another attention, everything else equal.

    Gains are in points of the average drop, in points of accuracy, and of times and outliers in percent of the other's;
    infinite where the other's training broke.

    Attributes:
        cell: the model that the papers say is better.
        over: the other's attention.
        gains: one for each seed.
        theirs: one for each of the papers' models; nothing where they print no numbers.
    """

    cell: Cell
    over: str
    gains: tuple[float, ...]
    theirs: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return fmean(self.gains)

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval of the mean (Student's t); None where there is none."""
        count = len(self.gains)
        if count < 2 or not all(map(math.isfinite, self.gains)):
            return None
        return _T[min(count - 1, max(_T))] * stdev(self.gains) / math.sqrt(count)

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies on the papers' side of 0: theirs is better where they print no numbers.

        One that holds 0 but none of the papers' own gains says that the gain is smaller, if there is any. Undecided are
        others that hold 0, a single seed, and papers whose models differ.
        """
        if len(self.gains) < 2:
            return "undecided"
        finite = [math.isfinite(gain) for gain in self.gains]
        if self.theirs and not any(map(math.isfinite, self.theirs)):  # theirs: the other breaks
            return "undecided" if any(finite) != all(finite) else "disagrees" if all(finite) else "agrees"
        sides = {_sign(gain) for gain in self.theirs} - {0} if self.theirs else {1}
        interval = self.interval
        if interval is None or len(sides) != 1:
            return "undecided"
        (side,) = sides
        if abs(self.mean) > interval:
            return "agrees" if _sign(self.mean) == side else "disagrees"
        smallest = min((side * gain for gain in self.theirs), default=0.0)
        return "smaller" if side * self.mean + interval < smallest else "undecided"


def compare(
    published: Published, experiment: Experiment, records: Iterable[Record], *, metric: str | None = None
) -> list[Comparison]:
    """Return the comparisons that an experiment's records allow.

    A gain needs both models with the same seed, and for average drops their bases too.

    Args:
        published: the papers' numbers.
        experiment: what is compared.
        records: of one group.
        metric: compare drops of this metric alone, in place of their average.
    """
    table = published.table(experiment.name) if experiment.is_printed else None
    rows: dict[tuple[Cell, int], Values] = {
        (r.cell, r.seed): r.values if metric is None else {metric: r.values.get(metric)}
        for r in records
        if r.measure in experiment.measures
    }
    seeds = sorted({seed for _, seed in rows})
    found = []
    for cell, over in pairs(experiment):
        gains = [_gain_of_seed(experiment, rows, cell, over, seed) for seed in seeds]
        measured = tuple(gain for gain in gains if gain is not None)
        if measured:
            theirs = their_gains(published, table, cell, over, metric=metric)
            found.append(Comparison(cell=cell, over=over.framework, gains=measured, theirs=theirs))
    return found


def pairs(experiment: Experiment) -> list[tuple[Cell, Cell]]:
    """Return what an experiment compares: each model that should be better with each that it should be better than."""
    cells = experiment.all_cells
    bases = [experiment.base(cell) for cell in cells] if experiment.has_drops else []
    compared = [cell for cell in cells if cell not in (*bases, *experiment.beside)]
    better = [cell for cell in compared if cell.framework in experiment.better]
    twins = [(cell, replace(cell, framework=over)) for cell in better for over in experiment.worse]
    return [(cell, twin) for cell, twin in twins if twin in cells]


def their_gains(
    published: Published, table: PublishedTable | None, cell: Cell, over: Cell, *, metric: str | None = None
) -> tuple[float, ...]:
    """Return the gains of the papers' models, average drops computed from their rows' own metrics."""
    gains = []
    for model in models_of(table):
        assert table is not None
        row, other = find_row(table, cell, model), find_row(table, over, model)
        if row is None or other is None:
            continue
        drop, other_drop = (_drop(published, which, metric) for which in (row, other))
        if drop is not None and other_drop is not None:
            gains.append(other_drop - drop)
        elif metric is None and (gain := _gain(row.values, other.values)) is not None:
            gains.append(gain)
    return tuple(gains)


def _drop(published: Published, row: PublishedRow, metric: str | None) -> float | None:
    if metric is not None:
        return recompute_metric(published, row, metric)
    found = recompute(published, row)
    return None if found is None else found.percent


def _gain_of_seed(
    experiment: Experiment, rows: Mapping[tuple[Cell, int], Values], cell: Cell, over: Cell, seed: int
) -> float | None:
    own, other = rows.get((cell, seed)), rows.get((over, seed))
    if own is None or other is None:
        return None
    if not experiment.has_drops:
        return _gain(own, other)
    bases = [rows.get((experiment.base(which), seed)) for which in (cell, over)]
    drops = [
        None if base is None else average_drop(values, base).percent
        for values, base in zip((own, other), bases, strict=True)
    ]
    return None if drops[0] is None or drops[1] is None else drops[1] - drops[0]


def _gain(own: Values, other: Values) -> float | None:
    if "accuracy" not in own:
        drop = average_drop(own, other).percent
        return None if drop is None else -drop
    accuracy, reference = own["accuracy"], other["accuracy"]
    if accuracy is None or reference is None:
        return None if accuracy is None and reference is None else math.inf if reference is None else -math.inf
    return accuracy - reference


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
