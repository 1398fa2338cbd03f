"""Running an experiment: every model that it names is trained, measured and recorded, unless that is done."""

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparq.errors import SparqError
from sparq.papers.energy import read_joules
from sparq.papers.experiments import Cell, Experiment, Measure
from sparq.papers.measures import MEASURES, OPT_SHAPES, Values, count_parameters
from sparq.papers.page import write_page
from sparq.papers.profiles import Profile
from sparq.papers.records import Record, add_records, read_records
from sparq.papers.trained import PreparedCell, TrainedCell
from sparq.papers.turns import Timed, measure_latency, measure_training
from sparq.papers.views import cell_labels
from sparq.recipes.speech_steps import set_threads
from sparq.report import Provenance, collect_provenance, utc_now
from sparq.report.drop import metric_names

_LOG = logging.getLogger(__name__)

_IN_TURNS: dict[tuple[Measure, ...], Callable[[Mapping[Cell, PreparedCell]], Timed]] = {
    ("latency",): measure_latency,
    ("training",): measure_training,
}

_DIVERGED = "the loss is "
"""How the training loop's message of a loss that is not finite begins."""


def run_experiment(experiment: Experiment, profile: Profile, *, out: Path, results: Path, seed: int) -> list[Record]:
    """Do what an experiment needs and return its records.

    Models are shared by experiments: what another one has trained or measured is not done again. Each record is in the
    results file as soon as it is there. An experiment that draws something writes `NAME.html` into `out`. A training
    whose loss is not finite is a result: its metrics are None, and the record says why.

    Args:
        experiment: which table or figure.
        profile: where models come from.
        out: folder of run folders and pages.
        results: the results file.
        seed: of every random choice.

    Raises:
        SparqError: the results file has results of this profile and seed under other settings, or a step fails.
    """
    # Now, because what has been trained already is measured with as many.
    set_threads(profile.recipe)
    if experiment.measures == ("parameters",):
        return _parameters(experiment, profile, results, seed)
    if experiment.measures in _IN_TURNS:
        return _in_turns(experiment, profile, out=out, results=results, seed=seed)
    known = {record.key: record for record in read_records(results)}
    page = out / f"{experiment.name}.html"
    wanted = _wanted(experiment, profile, seed, known, results)
    complete = all(record.key in known for records in wanted.values() for record in records)
    draws = experiment.figure and not (complete and page.exists())
    models: list[TrainedCell] = []
    last: tuple[object, TrainedCell | str] | None = None
    for cell, records in wanted.items():
        missing = [record for record in records if record.key not in known]
        if not (missing or draws):
            continue
        if last is None or last[0] != _training(cell):
            if last is not None and isinstance(last[1], TrainedCell):
                last[1].forget_model()
            last = _training(cell), _train(cell, profile, seed, out)
        model = last[1]
        if isinstance(model, TrainedCell):
            models.append(model)
        for template in missing:
            record = _measured(template, model, profile, _note(profile, cell))
            add_records(results, [record])
            known[record.key] = record
            _LOG.info("  %s: %s", " ".join(cell_labels(cell)), record.values or record.note)
    if draws and models:
        write_page(page, experiment, models)
    return [known[record.key] for records in wanted.values() for record in records]


def _wanted(
    experiment: Experiment, profile: Profile, seed: int, known: Mapping[Any, Record], results: Path
) -> dict[Cell, list[Record]]:
    """Return the records that an experiment is of, without their values, models that are trained alike together.

    Raises:
        SparqError: some are known, but under other settings.
    """
    provenance = _provenance()
    wanted = {
        cell: [_record(profile, cell, measure, seed, provenance) for measure in experiment.measures]
        for cell in sorted(experiment.all_cells, key=_training)
    }
    for record in (record for records in wanted.values() for record in records):
        if known.get(record.key, record).settings != record.settings:
            raise SparqError(
                f"{results} has results of {record.recipe!r} ({record.profile}, seed {seed}) under other settings: name"
                " another --results, or give the recipe another name"
            )
    return wanted


def _in_turns(experiment: Experiment, profile: Profile, *, out: Path, results: Path, seed: int) -> list[Record]:
    """Measure the times of all models at once; if those of one are missing, of all anew."""
    known = {record.key: record for record in read_records(results)}
    templates = {cell: record for cell, (record,) in _wanted(experiment, profile, seed, known, results).items()}
    if all(template.key in known for template in templates.values()):
        return [known[templates[cell].key] for cell in experiment.cells]
    models = {cell: PreparedCell(cell, profile, seed, out) for cell in experiment.cells}
    start, joules = time.perf_counter(), read_joules()
    timed, note = _IN_TURNS[experiment.measures](models)
    whole = _finished(templates[experiment.cells[0]], {}, note, start, joules)
    records = [
        dataclasses.replace(whole, cell=cell, settings=templates[cell].settings, values=values)
        for cell, values in timed.items()
    ]
    add_records(results, records)
    return records


def _training(cell: Cell) -> tuple[str, int, str]:
    return cell.adaptation, cell.rank, cell.framework


def _train(cell: Cell, profile: Profile, seed: int, out: Path) -> TrainedCell | str:
    """Return the model, or what training says of a loss that is not finite."""
    try:
        return TrainedCell(cell, profile, seed, out)
    except SparqError as error:
        if not str(error).startswith(_DIVERGED):
            raise
        return str(error)


def _provenance() -> Provenance:
    """Return what runs here, without the kernel's own name, which says nothing about a number."""
    return dataclasses.replace(collect_provenance(), platform=f"{platform.system()} {platform.machine()}")


def _note(profile: Profile, cell: Cell) -> str:
    rank = profile.rank_of(cell)
    if profile.ships(cell):
        return (
            f"LoRA models of rank {rank} are the demo's shipped adapters, which this recipe trained with this seed"
            " (--shipped)."
        )
    return f"Rank {rank} stands for {cell.rank}." if cell.rank not in (0, rank) else ""


def _record(profile: Profile, cell: Cell, measure: Measure, seed: int, provenance: Provenance) -> Record:
    return Record(
        profile=profile.name,
        model=Path(profile.recipe.model.backbone).name,
        recipe=profile.recipe.name,
        cell=cell,
        measure=measure,
        seed=seed,
        values={},
        seconds=0.0,
        created=utc_now(),
        settings=profile.settings_of(cell, seed),
        provenance=provenance,
    )


def _measured(template: Record, model: TrainedCell | str, profile: Profile, note: str) -> Record:
    if isinstance(model, str):
        heard = profile.recipe.evaluate.vocoder is not None
        names = {"tasks": metric_names(heard=heard), "accuracy": ("accuracy",)}.get(template.measure, ())
        values: Values = dict.fromkeys(names)
        return dataclasses.replace(template, values=values, note=model)
    start, joules = time.perf_counter(), read_joules()
    return _finished(template, MEASURES[template.measure](model, template.cell), note, start, joules)


def _finished(template: Record, values: Values, note: str, start: float, joules: float | None) -> Record:
    """Return a record with its values and what it took since a time and a counter of energy."""
    seconds, after = time.perf_counter() - start, read_joules()
    return dataclasses.replace(
        template,
        values=values,
        note=note,
        seconds=round(seconds, 2),
        # The counter may have started over.
        joules=None if joules is None or after is None or after < joules else round(after - joules, 1),
        created=utc_now(),
    )


def _parameters(experiment: Experiment, profile: Profile, results: Path, seed: int) -> list[Record]:
    (cell,) = experiment.cells
    provenance = _provenance()
    records = []
    for size in OPT_SHAPES:
        start = time.perf_counter()
        record = _record(profile, cell, "parameters", seed, provenance)
        record = dataclasses.replace(record, profile="shapes", recipe="table11", settings="")
        values, seconds = count_parameters(size), round(time.perf_counter() - start, 2)
        records.append(dataclasses.replace(record, model=size, values=values, seconds=seconds))
    add_records(results, records)
    return records
