"""`docs/results.md`: generated from the published numbers and a results file, and from nothing else."""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from sparq.papers.experiments import EXPERIMENTS, Experiment
from sparq.papers.published import Published, load_published, recompute
from sparq.papers.records import Record
from sparq.papers.verdict_views import RESULT_TABLES, by_group, claim_by_claim
from sparq.papers.views import claims_table
from sparq.report.tables import Line, Table

_HEAD = """# Results

What the two papers print, checked against itself, and what was measured here. This page is generated from
`experiments/results.jsonl` and the published numbers by `sparq paper page`; a test fails when it is stale. Results
are means over seeds with the sample's standard deviation. Differences between attentions have 95 % confidence
intervals (Student's t over seeds); "agrees" means that the interval lies on the side of 0 where the papers' own numbers
are, "smaller" that it holds 0 and excludes all of the papers' own gains, "undecided" that it holds 0 otherwise or that
there is one seed. [papers.md](papers.md) says what each experiment is;
[../experiments/LOG.md](../experiments/LOG.md) has what was tried.
"""

_THEORY = """Their theory is checked in the tests: theorem C.1 holds as constructed, outputs to 1e-8; the norms of
proposition C.1 do not tell attentions apart before training ([papers.md](papers.md#their-theory-in-numbers))."""


def results_page(records: Sequence[Record], figures: Sequence[str] = ()) -> str:
    """Return the page as Markdown.

    Args:
        records: all results.
        figures: addresses of pictures, `.../MODEL/EXPERIMENT-WHAT.svg`, which are shown where the experiment is.
    """
    published = load_published()
    parts = [_HEAD, "## Claim by claim", markdown(claim_by_claim(published, records)), _THEORY]
    parts += ["## The papers against themselves", _disagreements(published), markdown(claims_table(published))]
    parts += ["## Experiments"]
    parts += [_section(published, experiment, records, figures) for experiment in EXPERIMENTS if experiment.measures]
    parts += [_origin(records)] if records else []
    return "\n\n".join(part.strip() for part in parts) + "\n"


def markdown(table: Table) -> str:
    """Return a table as Markdown, its caption above and its notes below."""
    lines = [line.cells for group in table.groups for line in group]
    rule = ["---" if index < table.num_headings else "---:" for index in range(len(table.columns))]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.columns, rule, *lines)]
    return "\n".join([f"{table.caption}:", "", *rows, *(("", " ".join(table.notes)) if table.notes else ())])


def _disagreements(published: Published) -> str:
    lines, averages = [], 0
    for table in published.tables:
        for row in table.rows:
            found = recompute(published, row)
            averages += found is not None
            if found is None or found.agrees:
                continue
            labels = " ".join(str(row.labels[name]) for name in ("model", "framework", "adaptation", "precision"))
            printed = f"{row.average_drop:.2f}"
            lines.append(Line(cells=(table.name, labels, printed, f"{found.percent:.2f}")))
    caption = f"Of {averages} rows with an average, {len(lines)} cannot have come from their own metrics"
    columns = ("Table", "Row", "Printed", "Computed")
    return markdown(Table(caption=caption, columns=columns, groups=(tuple(lines),), num_headings=2))


def _section(published: Published, experiment: Experiment, records: Sequence[Record], figures: Sequence[str]) -> str:
    head = f"### {experiment.name}: {experiment.title}\n\n"
    parts = []
    for own in by_group(records):
        # A group that was made for another experiment may have no more than the bases of this one.
        if experiment.has_drops and all(r.cell == experiment.base(r.cell) for r in own if r.cell in experiment.cells):
            continue
        tables = [view(published, experiment, own) for view in RESULT_TABLES]
        found = [markdown(table) for table in tables if table is not None]
        again = _code(command(experiment, own))
        parts += [*([] if again in parts else [again]), *found] if found else []
    for figure in map(PurePosixPath, figures):
        name, _, what = figure.stem.rpartition("-")
        if name == experiment.name:
            parts.append(f"![{experiment.title}: {what}, {figure.parent.name}]({figure})")
    return "\n\n".join([head.strip(), *(parts or [_code(command(experiment)), "Not measured yet."])])


def command(experiment: Experiment, records: Sequence[Record] = ()) -> str:
    """Return the command that measures what a group of records measured, with the settings that it was given.

    Args:
        experiment: which.
        records: of one group; nothing for what has not been measured.
    """
    # Counts need no training.
    profile = "smoke" if experiment.measures == ("parameters",) else records[-1].profile if records else "small"
    given = records[-1].provenance.command if records else ()
    words = [(word, value) for word, value in pairwise(given) if word in ("--recipe", "--set")]
    if profile != "recipe":
        words.insert(0, ("--profile", profile))
    once = " ".join(["sparq paper run", experiment.name, *(f"{word} {shlex.quote(value)}" for word, value in words)])
    own = [r for r in records if r.measure in experiment.measures and r.cell in experiment.all_cells]
    seeds = sorted({record.seed for record in own})
    if seeds in ([], [0]):
        return once
    return f"for seed in {' '.join(map(str, seeds))}; do {once} --seed $seed; done"


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _origin(records: Sequence[Record]) -> str:
    lines = set()
    for record in records:
        origin = record.provenance
        commit = origin.git_hash[:12] + (" and changes" if origin.git_dirty else "")
        threads = str(origin.num_threads)
        lines.add((commit, origin.packages["torch"], origin.cpu, threads, record.created[:10]))
    table = Table(
        caption="Where the numbers were made",
        columns=("Commit", "PyTorch", "Processor", "Threads", "Day"),
        groups=(tuple(Line(cells=cells) for cells in sorted(lines)),),
        num_headings=5,
    )
    return f"## Origin\n\n{markdown(table)}"
