"""What the experiments have found: records that accumulate in a file, a line each."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from sparq.errors import SparqError
from sparq.files import read_lines, write_text
from sparq.papers.experiments import Cell, Measure
from sparq.report.codec import record_from_json, to_json
from sparq.report.results import Provenance


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement of one model.

    Attributes:
        profile: the profile that it was made under.
        model: the backbone.
        recipe: name of the recipe that everything else comes from.
        cell: which model of the experiment.
        measure: what was measured.
        seed: seed of every random choice.
        settings: fingerprint of all settings of the model and its measurement but where files lie; empty without any.
        values: the numbers by metric; None where there is none to be had.
        note: what to know about them.
        seconds: wall time of the measurement alone; where models take turns, of that of all.
        joules: energy of the processor over that time, all of the machine's work; None where it cannot be read.
        created: UTC in ISO 8601.
        provenance: code, packages, machine and command.
    """

    profile: str
    model: str
    recipe: str
    cell: Cell
    measure: Measure
    seed: int
    settings: str
    values: dict[str, float | None]
    note: str = ""
    seconds: float
    joules: float | None = None
    created: str
    provenance: Provenance

    @property
    def key(self) -> tuple[str, str, str, Cell, Measure, int]:
        """What it is a measurement of; another one of the same takes its place."""
        return self.profile, self.model, self.recipe, self.cell, self.measure, self.seed

    @property
    def group(self) -> tuple[str, str, str]:
        """Profile, model and recipe: records that may be compared."""
        return self.profile, self.model, self.recipe


def read_records(path: Path) -> list[Record]:
    """Read a results file; a file that is not there has none.

    Raises:
        SparqError: a line is not a record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_lines(path, "results file"), start=1):
        try:
            records.append(record_from_json(Record, json.loads(line), f"{path}, line {number}"))
        except json.JSONDecodeError as error:
            raise SparqError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def add_records(path: Path, new: Iterable[Record]) -> None:
    """Add records to a results file, whole or not at all; a newer one takes the place of its like."""
    records = {record.key: record for record in read_records(path)}
    records.update({record.key: record for record in new})
    lines = [json.dumps(to_json(record), ensure_ascii=False) for record in records.values()]
    write_text(path, "".join(f"{line}\n" for line in lines))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric over seeds.

    Attributes:
        mean: the mean.
        deviation: the standard deviation of a sample, with n - 1; None for a single seed.
        seeds: the seeds that had a number.
    """

    mean: float
    deviation: float | None
    seeds: tuple[int, ...] = field(default=())


def summarize_seeds(records: Sequence[Record], metric: str) -> Summary | None:
    """Return mean and deviation of a metric over the records' seeds, None if no record has a number.

    The records are of one cell and measure. A NaN or an infinity stays in: a model that broke with one seed must show.
    """
    found = {r.seed: value for r in records if (value := r.values.get(metric)) is not None}
    assert len({r.cell for r in records}) <= 1, "seeds of one cell only"
    if not found:
        return None
    values = list(found.values())
    broken = not all(math.isfinite(value) for value in values)
    deviation = None if len(values) < 2 else math.nan if broken else stdev(values)
    return Summary(mean=fmean(values), deviation=deviation, seeds=tuple(sorted(found)))
