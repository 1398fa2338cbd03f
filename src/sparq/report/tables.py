"""The tables of a report, once as data; the terminal and the page draw the same cells."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from sparq.report.drop import Drop, drops, metrics
from sparq.report.numbers import (
    listed,
    metric_label,
    precision_label,
    show_bytes,
    show_change,
    show_interval,
    show_number,
    show_seconds,
)
from sparq.report.results import FULL, ErrorRate, Perplexity, Results, Row

WIDTH = 110
"""Most columns of a terminal table."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of cells; the first ones are its headings. `strong` names the indices of cells to stress."""

    cells: tuple[str, ...]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A caption, columns, groups of lines and notes; the first `num_headings` cells of a line name it.

    `numeric` tells whether the other cells are numbers, which stand flush right.
    """

    caption: str
    columns: tuple[str, ...]
    groups: tuple[tuple[Line, ...], ...]
    num_headings: int = 2
    notes: tuple[str, ...] = ()
    numeric: bool = True


def main_table(results: Results) -> Table | None:
    """Return framework x precision x four metrics, with each row's average performance drop; None if no run made them.

    Outliers that are measured by themselves have rows without tasks and no corpus.
    """
    names = metrics(results.rows)
    if not results.corpus and all(_value(row, name) is None for row in results.rows for name in names):
        return None
    shown = (*names, "tts_wer") if "tts_cer" in names else names
    found = drops(results)
    stressed = _least_drops(results, found)
    groups = []
    for framework in results.frameworks:
        lines = []
        for row in (r for r in results.ordered_rows() if r.framework == framework):
            values = tuple(show_number(_value(row, name)) for name in shown)
            drop = found.get(row.key)
            change = show_change(drop.percent) if drop else ("base" if row.precision == FULL else "-")
            used = drop.fraction_used if drop else "-"
            strong = frozenset({2 + len(shown)}) if row.key in stressed else frozenset()
            cells = (framework, precision_label(row.precision), *values, change, used)
            lines.append(Line(cells=cells, strong=strong))
        groups.append(tuple(lines))
    return Table(
        caption="Four tasks at each precision (lower is better everywhere)",
        columns=(
            "Framework",
            "Precision",
            *(metric_label(name) + ("" if name.endswith("ppl") else " %") for name in shown),
            "Drop %",
            "Metrics",
        ),
        groups=tuple(groups),
        notes=(*_counts(results, shown), *_references(results), *_left_out(found), *_without_base(results)),
    )


def prose_table(results: Results) -> Table | None:
    """Return the perplexity of plain prose before adaptation, None if no row has one."""
    precisions = [p for p in results.precisions if any(r.precision == p and r.prose_ppl for r in results.rows)]
    if not precisions:
        return None
    lines = []
    for framework in results.frameworks:
        base = _prose(results, framework, FULL)
        cells = []
        for precision in precisions:
            metric = _prose(results, framework, precision)
            text = show_number(metric.value if metric else None)
            if metric and base and precision != FULL and base.value:
                text += f" (x {show_number(metric.value / base.value)})"
            cells.append(text)
        lines.append(Line(cells=(framework, *cells)))
    counted = {(r.prose_ppl.split, r.prose_ppl.tokens) for r in results.rows if r.prose_ppl}
    return Table(
        caption="Prose PPL of the pretrained backbone before adaptation (x: times its own full precision)",
        columns=("Framework", *(precision_label(p) for p in precisions)),
        groups=(tuple(lines),),
        num_headings=1,
        notes=tuple(f"Over {tokens:,} tokens of {split}." for split, tokens in sorted(counted)),
    )


def asr_table(results: Results) -> Table | None:
    """Return word error rates by test split, None if no row has any."""
    splits = list(dict.fromkeys(split for row in results.ordered_rows() for split in row.asr))
    if not splits:
        return None
    groups: dict[str, list[Line]] = {}
    for row in results.ordered_rows():
        if not row.asr:
            continue
        cells = []
        for split in splits:
            entry = row.asr.get(split)
            shown = (
                f"{show_interval(entry.wer, entry.low, entry.high)} ({entry.errors:,}/{entry.words:,})"
                if entry
                else "-"
            )
            cells.append(shown)
        line = Line(cells=(row.framework, precision_label(row.precision), *cells))
        groups.setdefault(row.framework, []).append(line)
    sizes = {s: {r.asr[s].utterances for r in results.rows if s in r.asr} for s in splits}
    return Table(
        caption="ASR WER % by test split [95 % interval over utterances] (errors/reference words)",
        columns=("Framework", "Precision", *splits),
        groups=tuple(tuple(lines) for lines in groups.values()),
        notes=tuple(f"{s}: {' or '.join(f'{n:,}' for n in sorted(sizes[s]))} utterances." for s in splits),
    )


def tts_table(results: Results) -> Table | None:
    """Return what a recognizer hears in the models' speech and in what it is compared with, None if nobody listened."""
    if not any(row.tts_cer for row in results.rows):
        return None
    groups: list[tuple[Line, ...]] = [
        (Line(cells=(reference.name, "-", _with_interval(reference.cer), _with_interval(reference.wer), "-")),)
        for reference in results.speech_references
    ]
    for framework in results.frameworks:
        rows = [r for r in results.ordered_rows() if r.framework == framework]
        groups.append(
            tuple(
                Line(
                    cells=(
                        framework,
                        precision_label(r.precision),
                        _with_interval(r.tts_cer),
                        _with_interval(r.tts_wer),
                        show_number(_value(r, "tts_uer")),
                    )
                )
                for r in rows
            )
        )
    return Table(
        caption="What the recognizer hears in speech [95 % interval over utterances]",
        columns=("Speaker", "Precision", "CER %", "WER %", "Units: UER %"),
        groups=tuple(groups),
        notes=tuple(_counts(results, ("tts_cer", "tts_wer", "tts_uer"))),
    )


def step_table(results: Results) -> Table | None:
    """Return time and peak memory per step and the time of each evaluation, None if nothing was timed."""
    names = list(dict.fromkeys((*results.wall_seconds, *results.peak_memory_bytes)))
    lines = []
    for name in names:
        seconds, size = results.wall_seconds.get(name), results.peak_memory_bytes.get(name)
        time = "-" if seconds is None else show_seconds(seconds)
        lines.append(Line(cells=(name, time, "-" if size is None else show_bytes(size))))
    evaluations = [
        Line(cells=(f"evaluating {r.framework} {precision_label(r.precision)}", show_seconds(r.seconds), "-"))
        for r in results.ordered_rows()
        if r.seconds is not None
    ]
    groups = tuple(tuple(group) for group in (lines, evaluations) if group)
    columns = ("Step", "Wall time", "Peak memory")
    return Table(caption="Time and memory", columns=columns, groups=groups, num_headings=1) if groups else None


def corpus_table(results: Results) -> Table | None:
    """Return the size of each split, None if there is none."""
    lines = [
        Line(cells=(name, f"{split.hours:.2f}", f"{split.utterances:,}", f"{split.speakers:,}"))
        for name, split in results.corpus.items()
    ]
    columns = ("Split", "Hours", "Utterances", "Speakers")
    return Table(caption="Corpus", columns=columns, groups=(tuple(lines),), num_headings=1) if lines else None


def draw(table: Table) -> str:
    """Return a table as aligned plain text; headings are flush left, numbers flush right."""
    lines = [line.cells for group in table.groups for line in group]
    widths = [max(len(row[i]) for row in (table.columns, *lines)) for i in range(len(table.columns))]

    def aligned(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if index < table.num_headings else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    out = [table.caption, rule, aligned(table.columns)]
    ruled = any(len(group) > 1 for group in table.groups)
    for index, group in enumerate(table.groups):
        out += [rule] * (index == 0 or ruled) + [aligned(line.cells) for line in group]
    out.append(rule)
    for note in table.notes:
        out += textwrap.wrap(note, WIDTH, subsequent_indent="  ")
    return "\n".join(out)


def _value(row: Row, name: str) -> float | None:
    metric = getattr(row, name)
    return None if metric is None else metric.value


def _prose(results: Results, framework: str, precision: str) -> Perplexity | None:
    row = results.row(framework, precision)
    return row.prose_ppl if row else None


def _least_drops(results: Results, found: dict[str, Drop]) -> set[str]:
    """Return the rows with the least drop of their precision, where drops are over the same metrics."""
    least = set()
    for precision in results.precisions:
        rows = [r.key for r in results.ordered_rows() if r.precision == precision and r.key in found]
        percents = {key: found[key].percent for key in rows}
        known = {key: percent for key, percent in percents.items() if percent is not None}
        if len(known) > 1 and len({found[key].used for key in known}) == 1:
            least |= {key for key, percent in known.items() if percent == min(known.values())}
    return least


_LENGTHS = {"wer": "words", "cer": "characters", "uer": "units", "ppl": "tokens"}


def _with_interval(rate: ErrorRate | None) -> str:
    return "-" if rate is None else show_interval(rate.value, rate.low, rate.high)


def _references(results: Results) -> list[str]:
    """Return a sentence on what the recognizer hears where no model speaks."""
    said = [
        f"{_with_interval(r.cer)} % CER and {_with_interval(r.wer)} % WER in the {r.name}"
        for r in results.speech_references
    ]
    return [f"TTS: over the same utterances the recognizer has {listed(said)}."] if said else []


def _counts(results: Results, names: Iterable[str]) -> list[str]:
    """Return one sentence per metric: the denominators, all of them if rows differ."""
    sentences = []
    for name in names:
        measured = [m for m in (getattr(row, name) for row in results.ordered_rows()) if m is not None]
        phrases = dict.fromkeys(_denominator(m, _LENGTHS[name.rpartition("_")[2]]) for m in measured)
        if phrases:
            sentences.append(f"{metric_label(name)}: over " + "; or ".join(phrases) + ".")
        else:
            sentences.append(f"{metric_label(name)}: not measured.")
    return sentences


def _denominator(metric: Perplexity | ErrorRate, length_unit: str) -> str:
    if isinstance(metric, Perplexity):
        count = f"{metric.tokens:,} tokens"
    else:
        count = f"{metric.length:,} reference {length_unit}"
    return f"{count} of {metric.utterances:,} utterances ({metric.split})"


def _left_out(found: dict[str, Drop]) -> list[str]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for key, drop in found.items():
        for metric, reason in drop.left_out.items():
            by_reason.setdefault((metric, reason), []).append(key)
    sentences = []
    for (metric, reason), keys in by_reason.items():
        rows = "every row" if len(keys) == len(found) else ", ".join(keys)
        sentences.append(f"Drop leaves out {metric_label(metric)} ({reason}) for {rows}.")
    return sentences


def _without_base(results: Results) -> list[str]:
    missing = [f for f in results.frameworks if results.row(f, FULL) is None]
    return [f"No drop for {f}: it has no row at full precision." for f in missing]
