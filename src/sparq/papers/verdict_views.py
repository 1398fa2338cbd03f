"""Verdicts on the papers' claims as tables: of one experiment's comparisons, and of all claims."""

import math
from collections.abc import Iterable, Sequence
from typing import get_args

from sparq.papers.experiments import EXPERIMENTS, Experiment
from sparq.papers.published import Published
from sparq.papers.records import Record
from sparq.papers.verdicts import Comparison, Verdict, compare, pairs, their_gains
from sparq.papers.views import LABELS, cell_labels, comparison
from sparq.report.numbers import show_change, show_number
from sparq.report.tables import Line, Table


def by_group(records: Iterable[Record]) -> list[list[Record]]:
    """Return the records that may be compared with each other, in the order of their first."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def verdict_table(published: Published, experiment: Experiment, records: Sequence[Record]) -> Table | None:
    """Return an experiment's comparisons, None if its records, of one group, allow none."""
    found = compare(published, experiment, records) if experiment.claim else []
    lines = []
    for one in found:
        interval = "-" if one.interval is None else f"± {show_number(one.interval)}"
        shown = (show_change(one.mean), interval, str(len(one.gains)), _range(one.theirs), one.verdict)
        lines.append(Line(cells=(*cell_labels(one.cell), one.over, *shown)))
    if not lines:
        return None
    return Table(
        caption=f"By how much the first is better than the second, in {_unit(experiment)}",
        columns=("Framework", "Adapted", "Precision", "Than", "Ours", "95 %", "Seeds", "Theirs", "The papers' claim"),
        groups=(tuple(lines),),
        num_headings=4,
    )


def metric_table(published: Published, experiment: Experiment, records: Sequence[Record]) -> Table | None:
    """Return comparisons by metric, None if the records, of one group, allow none over two seeds or more.

    One metric that hardly repeats from seed to seed, such as what a recognizer makes of speech that is not learned,
    hides in the average what the others say.
    """
    if not (experiment.claim and experiment.has_drops):
        return None
    metrics = list(dict.fromkeys(m for r in records if r.measure == "tasks" for m in r.values))
    lines: dict[tuple[str, ...], list[str]] = {}
    for metric in metrics:
        for one in compare(published, experiment, records, metric=metric):
            if one.interval is not None:
                theirs = f" ({_range(one.theirs)})" if one.theirs else ""
                shown = f"{show_change(one.mean)} ± {show_number(one.interval)}{theirs}: {one.verdict}"
                cells = lines.setdefault((*cell_labels(one.cell), one.over), ["-"] * len(metrics))
                cells[metrics.index(metric)] = shown
    if not lines:
        return None
    return Table(
        caption="The same by metric, in points of its own drop: ours with its 95 % interval (theirs): verdict",
        columns=("Framework", "Adapted", "Precision", "Than", *(LABELS[metric] for metric in metrics)),
        groups=(tuple(Line(cells=(*labels, *cells)) for labels, cells in lines.items()),),
        num_headings=4,
    )


RESULT_TABLES = (comparison, verdict_table, metric_table)
"""What is shown of an experiment and a group of records: our numbers, and how the attentions compare."""


def claim_by_claim(published: Published, records: Sequence[Record]) -> Table:
    """Return what the papers claim, in how many comparisons their numbers say so, and in how many ours do.

    Of comparisons that several groups of records of a model have, the one with the most seeds counts, the latest of
    equals.
    """
    lines = []
    for experiment in EXPERIMENTS:
        if not experiment.claim:
            continue
        theirs = _score(_their_comparisons(published, experiment))
        by_model: dict[str, dict[object, Comparison]] = {}
        for own in by_group(records):
            for one in compare(published, experiment, own):
                best = by_model.setdefault(own[0].model, {})
                key = one.cell, one.over
                if key not in best or len(one.gains) >= len(best[key].gains):
                    best[key] = one
        for model, found in by_model.items() or [("-", {})]:
            ours = list(found.values())
            seeds = sorted({len(one.gains) for one in ours})
            cells = (
                experiment.claim,
                experiment.name,
                theirs,
                model,
                _score([one.mean for one in ours]),
                " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "-",
                _verdicts(ours),
            )
            lines.append(Line(cells=cells))
    return Table(
        caption="In how many comparisons the papers' attention is better, and by how much",
        columns=("Claim", "Experiment", "Theirs", "Our model", "Ours", "Seeds", "Verdicts"),
        groups=(tuple(lines),),
        num_headings=2,
        notes=(
            "Points of the average performance drop or of accuracy; percent of times and outliers."
            " The two readings of their formula count as two. Intervals are not corrected for their number.",
        ),
    )


def _their_comparisons(published: Published, experiment: Experiment) -> list[float]:
    table = published.table(experiment.name) if experiment.is_printed else None
    first = [(cell, over) for cell, over in pairs(experiment) if cell.framework == experiment.better[0]]
    return [gain for cell, over in first for gain in their_gains(published, table, cell, over)]


def _score(gains: Sequence[float]) -> str:
    if not gains:
        return "-"
    return f"{sum(gain > 0 for gain in gains)} of {len(gains)}: {_range(gains)}"


def _range(gains: Sequence[float]) -> str:
    if not gains:
        return "-"
    if not any(map(math.isfinite, gains)):
        return "the other breaks"
    ends = dict.fromkeys(show_change(gain) for gain in (min(gains), max(gains)))
    return " to ".join(ends)


def _verdicts(found: Sequence[Comparison]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in get_args(Verdict)}
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count) or "not measured"


def _unit(experiment: Experiment) -> str:
    if experiment.has_drops:
        return "points of the average drop"
    return "points of accuracy" if "accuracy" in experiment.measures else "percent of the second's"
