"""The numbers that the two papers print, and their averages computed again from their own rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Literal

from sparq.configuration import from_mapping
from sparq.errors import unknown
from sparq.report.drop import average_drop

Labels = dict[str, str | int]
"""What a row is about: `model`, `framework`, `adaptation`, `rank`, `precision`; `ours` is the papers' own framework."""

_HALF = 0.005
"""Half of the last printed digit of every metric of the four tasks."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured quantity: its printed name, its unit, and which direction is better."""

    label: str
    unit: str
    better: Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper: its title, and what its own framework puts into the place of the softmax, in its words."""

    title: str
    framework: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a row's average refers to: full fine-tuning of the same model in full precision."""

    table: str
    framework: str


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of a table.

    Attributes:
        labels: what it is about.
        values: metrics as printed; None for N/A.
        average_drop: the average performance drop as printed, in percent; None where the row has none.
        base: what it refers to; None where the row has no average.
        note: what is odd about it.
    """

    labels: Labels
    values: dict[str, float | None]
    average_drop: float | None = None
    base: Base | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table: its name here, such as `sparq-6`, paper, printed number, what it shows, and its rows in their order."""

    name: str
    paper: str
    number: str
    caption: str
    metrics: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    note: str = ""

    def row(self, labels: Mapping[str, str | int]) -> PublishedRow:
        """Return the row with exactly these labels, which must exist."""
        (found,) = [row for row in self.rows if row.labels == labels]
        return found


@dataclass(frozen=True, kw_only=True)
class RowReference:
    """A row by its table and labels."""

    table: str
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A number of a paper's text.

    Attributes:
        paper: which paper.
        where: where in it.
        says: what it says.
        value: the number.
        unit: its unit.
        computed: how it follows from rows of the tables; None if no way was found.
        metric: the metric of these rows.
        rows: one row for `value`, else the row before and the row after.
        note: what is odd about it.
    """

    paper: str
    where: str
    says: str
    value: float
    unit: str
    computed: Literal["value", "difference", "reduction", "ratio"] | None
    metric: str | None
    rows: tuple[RowReference, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Both papers: metrics by name, tables in the order of the papers, and numbers of the text."""

    papers: dict[str, Paper]
    metrics: dict[str, Metric]
    tables: tuple[PublishedTable, ...]
    claims: tuple[Claim, ...] = field(default=())

    def table(self, name: str) -> PublishedTable:
        """Return a table by name.

        Raises:
            SparqError: there is none of that name.
        """
        found = next((table for table in self.tables if table.name == name), None)
        if found is None:
            raise unknown("table", name, [table.name for table in self.tables])
        return found

    def base_row(self, row: PublishedRow) -> PublishedRow:
        """Return the row that a row's average refers to."""
        assert row.base is not None, f"{row.labels} has no average"
        labels = {"model": row.labels["model"], "framework": row.base.framework, "adaptation": "full"}
        return self.table(row.base.table).row({**labels, "precision": "full"})


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A row's average from its own metrics.

    Attributes:
        percent: the mean of the four relative increases, from the metrics as printed.
        lowest: the least that it can be if every metric was rounded to its last printed digit.
        highest: the most.
        agrees: whether the printed average, rounded itself, lies between the two.
    """

    percent: float
    lowest: float
    highest: float
    agrees: bool


@cache
def load_published() -> Published:
    """Return the numbers of both papers."""
    text = (files("sparq") / "papers" / "published.json").read_text(encoding="utf-8")
    return from_mapping(Published, json.loads(text), "published")


def recompute(published: Published, row: PublishedRow) -> Recomputed | None:
    """Return a row's average performance drop from its own metrics, None if it has none.

    The average is 100 / 4 * sum over the four metrics of (value - base) / base (SpARQ section 4, table 1). Metrics are
    printed to two digits, so each may be off by half of the last one. The bounds take the worst of all roundings at
    once; a printed average outside of them cannot have come from the row.
    """
    if row.average_drop is None:
        return None
    base = published.base_row(row)

    def percent(value_shift: float, base_shift: float) -> float:
        drop = average_drop(_shifted(row.values, value_shift), _shifted(base.values, base_shift))
        assert drop.percent is not None
        assert not drop.left_out
        return drop.percent

    lowest, highest = percent(-_HALF, _HALF), percent(_HALF, -_HALF)
    agrees = lowest - _HALF <= row.average_drop <= highest + _HALF
    return Recomputed(percent=percent(0, 0), lowest=lowest, highest=highest, agrees=agrees)


def recompute_metric(published: Published, row: PublishedRow, metric: str) -> float | None:
    """Return what one metric adds to a row's average: its own relative increase in percent; None if it has none."""
    if row.average_drop is None or row.values.get(metric) is None:
        return None
    return average_drop({metric: row.values[metric]}, {metric: published.base_row(row).values.get(metric)}).percent


def recompute_claim(published: Published, claim: Claim) -> float | None:
    """Return what a claim's rows give, None if it is not known how the number came about."""
    if claim.computed is None:
        return None
    values = [_number(published, reference, claim.metric) for reference in claim.rows]
    if claim.computed == "value":
        (value,) = values
        return value
    before, after = values
    if claim.computed == "difference":
        return before - after
    return before / after if claim.computed == "ratio" else 100 * (before - after) / before


def _number(published: Published, reference: RowReference, metric: str | None) -> float:
    row = published.table(reference.table).row(reference.labels)
    value = row.average_drop if metric == "average_drop" else row.values[str(metric)]
    assert value is not None
    return value


def _shifted(values: Mapping[str, float | None], by: float) -> dict[str, float | None]:
    return {name: None if value is None else value + by for name, value in values.items()}
