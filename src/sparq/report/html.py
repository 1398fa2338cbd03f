"""report.html: one file that needs nothing else, from the records of results.json."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from sparq.files import write_text
from sparq.report.align import Segment, align
from sparq.report.alt import alternatives
from sparq.report.audio import Clip, embed
from sparq.report.codec import to_json
from sparq.report.definitions import DEFINITIONS
from sparq.report.heatmaps import attention_maps, hidden_maps
from sparq.report.numbers import precision_label, show_bytes
from sparq.report.outlier_tables import outlier_tables
from sparq.report.plots import layer_norms, learning_curves, outlier_bars, perplexity_bars
from sparq.report.results import Results
from sparq.report.summary import summarize
from sparq.report.tables import (
    Line,
    Table,
    asr_table,
    corpus_table,
    main_table,
    prose_table,
    step_table,
    tts_table,
)
from sparq.report.templates import render_template


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing and what it says to those who cannot see it."""

    svg: Markup
    alt: str


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What one model heard, aligned with the reference."""

    label: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A reference and what the models made of it; `clip` is None where there is no recording to play."""

    id: str
    reference: str
    lines: tuple[Transcript, ...]
    clip: Clip | None = None


@dataclass(frozen=True, kw_only=True)
class SplitExamples:
    """The example utterances of one test split."""

    split: str
    heard: tuple[Heard, ...]


def write_html(path: Path, results: Results, *, folder: Path) -> None:
    """Write report.html atomically.

    Args:
        path: the file to write.
        results: what to show.
        folder: what paths of audio samples are relative to: where results.json is.
    """
    write_text(path, render_html(results, folder=folder))


def render_html(results: Results, *, folder: Path) -> str:
    """Return the page: no scripts and no links to other files; all text from `results` is escaped."""
    content = {
        "results": results,
        "code": _code(results),
        "summary": summarize(results),
        "definitions": DEFINITIONS,
        "settings": yaml.safe_dump(to_json(results.settings), sort_keys=False, allow_unicode=True, width=100),
        **_tables(results),
        "outliers": outlier_tables(results),
        **_figures(results),
        "examples": _examples(results),
        "live": _live(results),
        "clips": _clips(results, folder),
    }
    sections = [(name, title) for name, title, needs in _SECTIONS if not needs or any(content[n] for n in needs)]
    return render_template("report.html.jinja", **content, sections=sections)


_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("summary", "Summary", ()),
    ("tasks", "Four tasks", ("main",)),
    ("prose", "Prose", ("prose",)),
    ("asr", "Recognition", ("asr",)),
    ("speech", "Speech", ("tts",)),
    ("outliers", "Outliers", ("outliers", "hidden_maps")),
    ("attention", "Attention", ("attention_maps",)),
    ("training", "Training", ("curves",)),
    ("listening", "Listening", ("clips",)),
    ("notes", "Definitions", ()),
    ("provenance", "Provenance", ()),
)


def _tables(results: Results) -> dict[str, Table | None]:
    return {
        "main": main_table(results),
        "prose": prose_table(results),
        "asr": asr_table(results),
        "tts": tts_table(results),
        "corpus": corpus_table(results),
        "steps": step_table(results),
        "machine": _machine(results),
    }


def _figures(results: Results) -> dict[str, Figure | None]:
    drawings = {
        "perplexity": perplexity_bars(results),
        "outlier_bars": outlier_bars(results),
        "layer_norms": layer_norms(results),
        "hidden_maps": hidden_maps(results),
        "attention_maps": attention_maps(results),
        "curves": learning_curves(results),
    }
    alts = alternatives(results)
    return {name: None if svg is None else Figure(svg=svg, alt=alts[name]) for name, svg in drawings.items()}


def _code(results: Results) -> str:
    provenance = results.provenance
    dirty = {True: ", with changes on top", False: "", None: ""}[provenance.git_dirty]
    return f"{provenance.git_hash[:12]}{dirty}"


def _machine(results: Results) -> Table:
    provenance = results.provenance
    values = {
        "Results schema": str(results.schema_version),
        "Code": _code(results),
        "Command": " ".join(provenance.command),
        "Platform": provenance.platform,
        "CPU": provenance.cpu,
        "CPUs, threads used": f"{provenance.num_cpus}, {provenance.num_threads}",
        "Memory": show_bytes(provenance.memory_bytes),
        **provenance.packages,
    }
    lines = tuple(Line(cells=item) for item in values.items())
    return Table(
        caption="Software and machine",
        columns=("What", "Value"),
        groups=(lines,),
        num_headings=1,
        numeric=False,
    )


def _examples(results: Results) -> list[SplitExamples]:
    """Return, by split, the example utterances with what every row heard."""
    splits: dict[str, dict[tuple[str, str], list[Transcript]]] = {}
    for row in results.ordered_rows():
        for split, entry in row.asr.items():
            for example in entry.examples:
                lines = splits.setdefault(split, {}).setdefault((example.id, example.reference), [])
                label = f"{row.framework}, {precision_label(row.precision)}"
                segments = align(example.reference, example.hypothesis)
                lines.append(Transcript(label=label, segments=segments))
    return [
        SplitExamples(
            split=split,
            heard=tuple(Heard(id=id, reference=ref, lines=tuple(lines)) for (id, ref), lines in found.items()),
        )
        for split, found in splits.items()
    ]


def _clips(results: Results, folder: Path) -> list[Heard]:
    labels = {r.key: f"{r.framework}, {precision_label(r.precision)}" for r in results.ordered_rows()}
    clips = []
    for sample in results.audio:
        keys = [key for key in labels if key in sample.hypotheses]
        keys += [key for key in sample.hypotheses if key not in labels]
        lines = tuple(
            Transcript(label=labels.get(key, key), segments=align(sample.reference, sample.hypotheses[key]))
            for key in keys
        )
        clip = embed(folder / sample.path)
        clips.append(Heard(id=sample.id, reference=sample.reference, lines=lines, clip=clip))
    return clips


def _live(results: Results) -> list[str]:
    sentences = []
    for name, curve in results.curves.items():
        if curve.live is None or not curve.live.points:
            continue
        first, last = curve.live.points[0].update, curve.live.points[-1].update
        sentences.append(f"{name}: this run repeated updates {first:,} to {last:,}; its {curve.comparison()}.")
    return sentences
