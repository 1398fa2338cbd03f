"""docs/results.md is what its inputs say, and verdicts are statistics."""

import math
from pathlib import Path
from statistics import stdev

import pytest

from paper_records import tasks
from sparq.cli.main import main
from sparq.papers import Cell, find_experiment, read_records
from sparq.papers.results_page import markdown, results_page
from sparq.papers.verdicts import compare_with_vanilla
from sparq.report.tables import Line, Table

REPOSITORY = Path(__file__).resolve().parent.parent
LOW = "w4a4-smoothquant"


def test_the_page_is_not_stale(tmp_path: Path) -> None:
    """Run `sparq paper page` after a change of experiments/results.jsonl or of the published numbers."""
    assert main(["paper", "page", str(REPOSITORY / "experiments" / "results.jsonl"), "--out", str(tmp_path / "p")]) == 0
    assert (tmp_path / "p").read_text() == (REPOSITORY / "docs" / "results.md").read_text()


def test_no_smoke_in_the_repositorys_results() -> None:
    """A tiny random model's numbers mean nothing."""
    assert {record.profile for record in read_records(REPOSITORY / "experiments" / "results.jsonl")} <= {
        "shapes", "small", "recipe",
    }  # fmt: skip


def rows(framework: str, seed: int, base: float, low: float) -> list:
    cell = Cell(framework=framework, precision=LOW)
    return [tasks(Cell(framework=framework), seed, *[base] * 4), tasks(cell, seed, *[low] * 4)]


def test_a_verdict_is_a_paired_t_interval_over_seeds() -> None:
    """Drops are 100, 110, 120 for vanilla and 50, 60, 64 for softmax1: differences of 50, 50 and 56 points."""
    records = [r for s, low in enumerate((20, 21, 22)) for r in rows("vanilla", s, 10, low)]
    records += [r for s, low in enumerate((15, 16, 16.4)) for r in rows("softmax1", s, 10, low)]
    (found,) = compare_with_vanilla(find_experiment("sparq-1"), records)
    assert (found.cell.framework, found.seeds, found.verdict) == ("softmax1", 3, "agrees")
    assert found.points == pytest.approx(52)
    assert found.interval == pytest.approx(4.303 * stdev((50, 50, 56)) / math.sqrt(3))
    page = results_page(records)
    assert "| softmax1 | full | w4a4-smoothquant | +52.00 | ± 8.61 | 3 | agrees |" in page


@pytest.mark.parametrize(
    ("vanilla", "own", "verdict"),
    [((20, 20), (30, 30.1), "disagrees"), ((20, 21), (20.5, 19.5), "undecided"), ((20,), (11,), "undecided"),
     ((math.inf, 20), (11, 11), "undecided")],
)  # fmt: skip
def test_other_verdicts(vanilla: tuple[float, ...], own: tuple[float, ...], verdict: str) -> None:
    records = [r for s, low in enumerate(vanilla) for r in rows("vanilla", s, 10, low)]
    records += [r for s, low in enumerate(own) for r in rows("max_shift", s, 10, low)]
    (found,) = compare_with_vanilla(find_experiment("sparq-1"), records)
    assert found.verdict == verdict


def test_what_has_no_twin_or_no_base_is_not_compared() -> None:
    assert compare_with_vanilla(find_experiment("sparq-1"), rows("softmax1", 0, 10, 20)) == []
    records = [*rows("softmax1", 0, 10, 20), *rows("vanilla", 1, 10, 20)]
    assert compare_with_vanilla(find_experiment("sparq-1"), records) == []


def test_an_empty_file_gives_a_page_that_says_so() -> None:
    page = results_page([])
    assert page.count("Not measured yet.") == page.count("### ")
    assert "Of 128 rows with an average, 17 cannot have come from their own metrics" in page


def test_a_figure_stands_in_its_experiments_section() -> None:
    page = results_page([], ["../x/figures/sparq-figure-3-outliers.svg"])
    assert page.count("Not measured yet.") == page.count("### ") - 1
    assert "![Outliers by task and adaptation: outliers](../x/figures/sparq-figure-3-outliers.svg)" in page


def test_tables_as_markdown() -> None:
    table = Table(
        caption="C", columns=("A", "|b|"), groups=((Line(cells=("x", "1")),),), num_headings=1, notes=("N.", "M.")
    )
    assert markdown(table) == "C:\n\n| A | \\|b\\| |\n| --- | ---: |\n| x | 1 |\n\nN. M."
