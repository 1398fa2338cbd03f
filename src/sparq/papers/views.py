"""The papers' tables and our results beside them, as tables for the terminal and for a page."""

import dataclasses
from collections.abc import Iterable, Sequence

from sparq.papers.experiments import EXPERIMENTS, Cell, Experiment
from sparq.papers.norm_condition import LayerNorms
from sparq.papers.published import Published, PublishedRow, PublishedTable, recompute, recompute_claim
from sparq.papers.records import Record, summarize_seeds
from sparq.papers.theirs import find_row, models_of
from sparq.report.drop import average_drop
from sparq.report.numbers import show_number
from sparq.report.tables import Line, Table

LABELS = {
    "textlm_ppl": "TextLM PPL",
    "speechlm_ppl": "SpeechLM PPL",
    "asr_wer": "ASR WER %",
    "tts_uer": "TTS UER %",
    "tts_cer": "TTS CER %",
    "accuracy": "accuracy %",
    "seconds_per_1000_tokens": "s / 1,000 tokens",
    "textlm_latency": "TextLM ms",
    "speechlm_latency": "SpeechLM ms",
    "lora_parameters": "LoRA M",
    "model_parameters": "model M",
    "lora_share": "share %",
}
"""Short names of metrics; others are shown as they are called."""

_UER = (
    "TTS UER is the error rate of generated units; the papers have error rates of a Whisper transcript. Averages are"
    " over the four metrics of each side."
)


def experiment_list() -> Table:
    """Return all tables and figures of both papers."""
    groups: dict[str, list[Line]] = {}
    for e in EXPERIMENTS:
        cells = (e.name, e.element, e.title, ", ".join(e.measures) or "-", str(len(e.all_cells) or "-"))
        groups.setdefault(e.paper, []).append(Line(cells=cells))
    return Table(
        caption="Tables and figures of the papers, each an experiment of `sparq paper run`",
        columns=("Name", "Printed as", "Shows", "Measured", "Models"),
        groups=tuple(tuple(lines) for lines in groups.values()),
        num_headings=4,
    )


def published_table(published: Published, table: PublishedTable) -> Table:
    """Return a published table; averages are given as printed and as computed from the row's own metrics."""
    names = [
        n for n in ("model", "framework", "adaptation", "rank", "precision") if any(n in r.labels for r in table.rows)
    ]
    has_average = any(row.average_drop is not None for row in table.rows)
    lines, notes = [], [table.note] if table.note else []
    for row in table.rows:
        cells = [str(row.labels.get(name, "-")) for name in names]
        cells += [show_printed(row.values[metric]) for metric in table.metrics]
        if has_average:
            cells += list(_averages(published, row))
        if row.note:
            notes.append(f"{' '.join(str(value) for value in row.labels.values())}: {row.note}")
        lines.append(Line(cells=tuple(cells)))
    metrics = [f"{m.label} {m.unit}".strip() for m in (published.metrics[name] for name in table.metrics)]
    if has_average:
        metrics += ["Drop %", "Computed", ""]
        notes.append("DISAGREES: the printed average cannot come from the row's metrics, however these were rounded.")
    return Table(
        caption=f"{table.number} of {published.papers[table.paper].title}: {table.caption}",
        columns=(*(name.capitalize() for name in names), *metrics),
        groups=(tuple(lines),),
        num_headings=len(names),
        notes=tuple(notes),
    )


def claims_table(published: Published) -> Table:
    """Return the numbers of the papers' texts beside what their tables give."""
    lines = []
    for claim in published.claims:
        value = recompute_claim(published, claim)
        cells = (claim.paper, claim.where, claim.says, f"{claim.value:g} {claim.unit}", show_printed(value))
        lines.append(Line(cells=cells))
    return Table(
        caption="Numbers of the papers' texts, and what their tables give",
        columns=("Paper", "Where", "Says", "Value", "From the tables"),
        groups=(tuple(lines),),
        num_headings=3,
    )


def comparison(published: Published, experiment: Experiment, records: Iterable[Record]) -> Table | None:
    """Return our numbers of an experiment beside the papers', of the models that we have; None if there are none.

    The records are of one group: one profile, model and recipe. Numbers are means over seeds, with the sample's
    standard deviation where there are several.
    """
    own = [r for r in records if r.measure in experiment.measures and r.cell in experiment.all_cells]
    if not own:
        return None
    table = published.table(experiment.name) if experiment.is_printed else None
    metrics = list(dict.fromkeys(metric for record in own for metric in record.values))
    tasks = [record for record in own if record.measure == "tasks"]
    models = models_of(table)
    if own[0].model in models:  # the papers' own backbone: its numbers alone
        models = [own[0].model]
    lines = []
    for cell in experiment.all_cells:
        of_cell = [record for record in own if record.cell == cell]
        if not of_cell:
            continue
        cells = [*cell_labels(cell), *(show_seeds(of_cell, metric) for metric in metrics)]
        if experiment.has_drops:
            cells.append(
                show_drops(*([r for r in tasks if r.cell == which] for which in (cell, experiment.base(cell))))
            )
        cells += [_theirs(published, table, cell, model) for model in models]
        lines.append(Line(cells=tuple(cells)))
    seeds = sorted({record.seed for record in own})
    what = "drop % (!: computed, the printed one disagrees)" if experiment.has_drops else "their metrics"
    notes = [f"Seeds {', '.join(map(str, seeds))}. Theirs, by model: {what}."] if models else []
    absent_cells = len(experiment.all_cells) - len(lines)
    notes += [f"Not measured: {absent_cells} of {len(experiment.all_cells)} models."] if absent_cells else []
    notes += [_UER] if experiment.has_drops and "tts_uer" in metrics else []
    absent = [m for m in metrics if any(m in r.values and r.values[m] is None for r in tasks)]
    if absent:
        notes.append(f"Averages leave out what a row lacks: {', '.join(LABELS[metric] for metric in absent)}.")
    notes += dict.fromkeys(record.note for record in own if record.note)
    return Table(
        caption=f"{experiment.name}: {experiment.title}; ours on {own[0].model}, {own[0].recipe}",
        columns=(
            "Framework", "Adapted", "Precision", *(LABELS.get(metric, metric) for metric in metrics),
            *(["Drop %"] if experiment.has_drops else []), *(f"theirs {model}".strip() for model in models),
        ),
        groups=(tuple(lines),),
        num_headings=3,
        notes=tuple(notes),
    )  # fmt: skip


def norms_table(model: str, norms: Sequence[LayerNorms]) -> Table:
    """Return the norms of proposition C.1 by layer."""
    has_update = norms[0].query_update_norm is not None
    lines = []
    for layer in norms:
        values = [layer.key_norm, layer.key_ratio]
        if layer.query_update_norm is not None and layer.query_update_ratio is not None:
            values += [layer.query_update_norm, layer.query_update_ratio]
        lines.append(Line(cells=(str(layer.layer), *(show_number(value) for value in values))))
    return Table(
        caption=f"Norms of SpARQ's proposition C.1 in {model}",
        columns=(
            "Layer", "max |X W_K|", "by sqrt(log L)", *(["max |a/r X B A|", "by sqrt(log L)"] if has_update else []),
        ),
        groups=(tuple(lines),),
        num_headings=1,
        notes=("L is the length of each sequence; the largest ratio of any.",),
    )  # fmt: skip


def cell_labels(cell: Cell) -> tuple[str, str, str]:
    """Return framework, adaptation with its rank, and precision."""
    return cell.framework, f"{cell.adaptation} {cell.rank or ''}".strip(), cell.precision


def show_printed(value: float | None) -> str:
    """Return a number with two digits, as the papers print; `N/A` if there is none."""
    return "N/A" if value is None else f"{value:.2f}"


def show_seeds(records: Sequence[Record], metric: str) -> str:
    """Return mean and deviation of a metric over seeds."""
    summary = summarize_seeds(records, metric)
    if summary is None:
        return "N/A" if records else "-"
    deviation = "" if summary.deviation is None else f" ± {show_number(summary.deviation)}"
    return show_number(summary.mean) + deviation


def show_drops(records: Sequence[Record], bases: Sequence[Record]) -> str:
    """Return mean and deviation over seeds of the average drop, each over the base of its own seed."""
    by_seed = {base.seed: base for base in bases}
    found = []
    for record in records:
        base = by_seed.get(record.seed)
        if base is None:
            continue
        if record.cell == base.cell:
            return "base"
        drop = average_drop(record.values, base.values)
        found.append(dataclasses.replace(record, values={"average_drop": drop.percent}))
    return show_seeds(found, "average_drop")


def _averages(published: Published, row: PublishedRow) -> tuple[str, str, str]:
    found = recompute(published, row)
    if found is None:
        return "base", "", ""
    return show_printed(row.average_drop), show_printed(found.percent), "" if found.agrees else "DISAGREES"


def _theirs(published: Published, table: PublishedTable | None, cell: Cell, model: str) -> str:
    """Return what the papers have for a cell; their framework stands beside both readings of it."""
    assert table is not None
    row = find_row(table, cell, model)
    if row is None:
        return "-"
    if any(r.average_drop is not None for r in table.rows):
        found = recompute(published, row)
        return "base" if found is None else show_printed(found.percent) + ("" if found.agrees else "!")
    return " / ".join(show_printed(value) for value in row.values.values())
