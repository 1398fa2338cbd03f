"""docs/results.md is what its inputs say, and verdicts are statistics."""

import dataclasses
import math
import shlex
from pathlib import Path
from statistics import stdev

import pytest

from paper_records import PROVENANCE, record, tasks
from sparq.cli.main import build_parser, main
from sparq.papers import Cell, Record, find_experiment, load_published, read_records
from sparq.papers.results_page import command, markdown, results_page
from sparq.papers.verdicts import Comparison, compare
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
        "shapes", "small", "small-opt", "recipe",
    }  # fmt: skip


def rows(framework: str, seed: int, base: float, low: float) -> list[Record]:
    cell = Cell(framework=framework, precision=LOW)
    return [tasks(Cell(framework=framework), seed, *[base] * 4), tasks(cell, seed, *[low] * 4)]


def comparisons(experiment: str, records: list[Record]) -> list[Comparison]:
    return compare(load_published(), find_experiment(experiment), records)


def test_a_verdict_is_a_paired_t_interval_over_seeds() -> None:
    """Drops are 100, 110, 120 for vanilla and 50, 60, 64 for softmax1: differences of 50, 50 and 56 points."""
    records = [r for s, low in enumerate((20, 21, 22)) for r in rows("vanilla", s, 10, low)]
    records += [r for s, low in enumerate((15, 16, 16.4)) for r in rows("softmax1", s, 10, low)]
    (found,) = comparisons("sparq-1", records)
    assert (found.cell.framework, found.over, len(found.gains), found.verdict) == ("softmax1", "vanilla", 3, "agrees")
    assert found.mean == pytest.approx(52)
    assert found.interval == pytest.approx(4.303 * stdev((50, 50, 56)) / math.sqrt(3))
    # SmoothQuant at W4A4: 197.31, 233.36 and 249.63 of vanilla, 122.31, 130.71 and 146.72 of theirs, computed.
    assert found.theirs == pytest.approx((75.01, 102.65, 102.91), abs=0.02)
    page = results_page(records)
    assert "| softmax1 | full | w4a4-smoothquant | vanilla | +52.00 | ± 8.61 | 3 | +75.01 to +102.9 | agrees |" in page
    assert "| sparq-1 | 9 of 9: +68.00 to +102.9 | tiny | 1 of 1: +52.00 | 3 | agrees 1 |" in page


@pytest.mark.parametrize(
    ("vanilla", "own", "verdict"),
    [((20, 20), (30, 30.1), "disagrees"), ((20, 21), (20.5, 19.5), "undecided"), ((20,), (11,), "undecided"),
     ((math.inf, 20), (11, 11), "undecided")],
)  # fmt: skip
def test_other_verdicts(vanilla: tuple[float, ...], own: tuple[float, ...], verdict: str) -> None:
    records = [r for s, low in enumerate(vanilla) for r in rows("vanilla", s, 10, low)]
    records += [r for s, low in enumerate(own) for r in rows("max_shift", s, 10, low)]
    (found,) = comparisons("sparq-1", records)
    assert found.verdict == verdict


def test_a_gain_that_is_excluded_is_smaller() -> None:
    """Theirs at W4A4 SmoothQuant is 75 to 103 points better than vanilla."""
    for spread, verdict in ((0.4, "smaller"), (8.0, "undecided")):
        records = [r for s in range(3) for r in rows("vanilla", s, 10, 20)]
        records += [r for s in range(3) for r in rows("softmax1", s, 10, 20 + spread * (s - 1))]
        (found,) = comparisons("sparq-1", records)
        assert found.verdict == verdict
    # Figure 1 prints no numbers, so that nothing can be smaller.
    same = [measured(name, "accuracy", s, accuracy=20.0 + s % 2) for s in range(3) for name in ("vanilla", "softmax1")]
    assert [one.verdict for one in comparisons("case-study-figure-1", same)] == ["undecided"]


def test_a_claim_is_not_about_what_its_table_compares_with() -> None:
    """Clipped weights stand beside plain ones, whose comparison is another table's."""
    lows = [(s, name, low) for s in (0, 1) for name, low in (("vanilla", 20), ("softmax1", 15 + s))]
    records = [r for s, name, low in lows for r in rows(name, s, 10, low)]
    clipped = [dataclasses.replace(r, cell=dataclasses.replace(r.cell, precision=f"{LOW}-clip5")) for r in records
               if r.cell.precision == LOW]  # fmt: skip
    found = comparisons("sparq-9", [*records, *clipped])
    assert [one.cell.precision for one in found] == [f"{LOW}-clip5"]


def test_comparisons_by_metric_show_what_the_average_hides() -> None:
    """One metric of chance, and one that falls by 50 and 52 points less."""
    records = []
    for seed, chance in enumerate((900.0, 10.0)):
        for name, low in (("vanilla", 20.0), ("softmax1", 15.0 - seed / 5)):
            tts = chance if name == "vanilla" else 910 - chance
            records += [tasks(Cell(framework=name), seed, *[10.0] * 4),
                        tasks(Cell(framework=name, precision=LOW), seed, low, 10, 10, tts)]  # fmt: skip
    (average,) = comparisons("sparq-1", records)
    assert average.verdict == "undecided"
    page = results_page(records)
    half = 12.706 * stdev((50, 52)) / math.sqrt(2)
    theirs = 100 * (45.23 / 22.56 - 37.14 / 22.70)  # OPT-125m: vanilla's drop, and theirs
    gain = f"+51.00 ± {half:.2f} (+{theirs:.2f} to +107.1): agrees"
    assert f"| softmax1 | full | w4a4-smoothquant | vanilla | {gain} | 0.00 ± 0.00 (+20" in page
    one_seed = [r for r in records if r.seed == 0]
    assert "The same by metric" not in results_page(one_seed)


def test_what_has_no_twin_or_no_base_is_not_compared() -> None:
    assert comparisons("sparq-1", rows("softmax1", 0, 10, 20)) == []
    assert comparisons("sparq-1", [*rows("softmax1", 0, 10, 20), *rows("vanilla", 1, 10, 20)]) == []
    low = [r for r in rows("vanilla", 0, 10, 20) if r.cell.precision == LOW]
    assert comparisons("sparq-1", [*rows("softmax1", 0, 10, 20), *low]) == []


def measured(framework: str, measure: str, seed: int = 0, **values: float | None) -> Record:
    made = record(Cell(framework=framework), seed, **values)
    return dataclasses.replace(made, measure=measure)


def test_the_papers_side_of_zero_need_not_be_the_better_one() -> None:
    """Their attention is slower in table 4 of the case study: a slower one of ours agrees with that."""
    records = [measured("vanilla", "latency", s, textlm_latency=100.0, speechlm_latency=200.0) for s in (0, 1)]
    records += [
        measured("softmax1", "latency", s, textlm_latency=more, speechlm_latency=2 * more)
        for s, more in enumerate((105.0, 106.0))
    ]
    (found,) = comparisons("case-study-4", records)
    assert found.gains == pytest.approx((-5, -6))
    assert found.theirs == pytest.approx((-1.63, -5.34), abs=0.01)
    assert found.verdict == "undecided"  # 12.7 * 0.5 points
    closer = [dataclasses.replace(found, gains=(-5.0, -5.1)), dataclasses.replace(found, gains=(5.0, 5.1))]
    assert [one.verdict for one in closer] == ["agrees", "disagrees"]
    differ = dataclasses.replace(found, gains=(5.0, 5.1), theirs=(0.0, 1.0, -1.0))
    assert differ.verdict == "undecided"


def test_a_training_that_breaks_is_a_result() -> None:
    """Table 4 of SpARQ has N/A for every stabilizer but max-shift."""
    whole = [measured("max_shift", "accuracy", s, accuracy=60.0) for s in (0, 1)]
    broken = [measured("none", "accuracy", s, accuracy=None) for s in (0, 1)]
    (found,) = comparisons("sparq-4", [*whole, *broken])
    assert (found.over, found.gains, found.theirs) == ("none", (math.inf, math.inf), (math.inf,))
    assert found.verdict == "agrees"
    survived = [measured("mean", "accuracy", s, accuracy=20.0) for s in (0, 1)]
    both = comparisons("sparq-4", [*whole, *broken, *survived])
    assert [(one.over, one.verdict) for one in both] == [("none", "agrees"), ("mean", "disagrees")]
    assert comparisons("sparq-4", [measured("max_shift", "accuracy", accuracy=None), broken[0]]) == []
    assert "3 of 3: the other breaks" in results_page([])


def test_other_outlier_free_attentions_are_compared_with_theirs() -> None:
    """In appendix G.1 clipped and gated are what theirs should be better than; vanilla is what table 6 is about."""
    records = [r for s in (0, 1) for name, low in (("softmax1", 12 + s / 9), ("clipped", 15), ("vanilla", 11))
               for r in rows(name, s, 10, low)]  # fmt: skip
    assert [(one.over, one.verdict) for one in comparisons("sparq-g1", records)] == [("clipped", "agrees")]
    assert [(one.over, one.verdict) for one in comparisons("sparq-1", records)] == [("vanilla", "disagrees")]


def test_the_better_of_two_groups_counts() -> None:
    """The claim's line takes the comparison with more seeds; each group keeps its own table."""
    many = [r for s in (0, 1) for name, low in (("vanilla", 20), ("softmax1", 15)) for r in rows(name, s, 10, low)]
    one = [dataclasses.replace(r, recipe="other") for r in many if r.seed == 0]
    page = results_page([*many, *one])
    assert "| sparq-1 | 9 of 9: +68.00 to +102.9 | tiny | 1 of 1: +50.00 | 2 | agrees 1 |" in page
    assert page.count("sparq-1: Quantization to W4A4; ours on tiny") == 2


def test_each_model_has_its_own_line_of_a_claim() -> None:
    tiny = [*rows("vanilla", 0, 10, 20), *rows("softmax1", 0, 10, 15)]
    page = results_page([*tiny, *(dataclasses.replace(r, model="huge", recipe="big") for r in tiny)])
    for model in ("tiny", "huge"):
        assert f"| sparq-1 | 9 of 9: +68.00 to +102.9 | {model} | 1 of 1: +50.00 | 1 | undecided 1 |" in page


def test_a_table_has_the_command_that_made_it() -> None:
    """As parsed again, with the settings that it was given, and once for groups that share it."""
    arguments = ["paper", "run", "x", "--set", "name=a b", "--frameworks", "vanilla", "--set", "train.updates=2"]
    provenance = dataclasses.replace(PROVENANCE, command=("sparq", *arguments))
    plain = rows("vanilla", 0, 10, 20)
    changed = [dataclasses.replace(r, recipe="a b", profile="small-opt", provenance=provenance) for r in plain]
    experiment = find_experiment("sparq-1")
    parsed = build_parser().parse_args(shlex.split(command(experiment, changed))[1:])
    assert (parsed.experiments, parsed.profile, parsed.overrides) == (
        ["sparq-1"], "small-opt", ["name=a b", "train.updates=2"],
    )  # fmt: skip
    own = dataclasses.replace(PROVENANCE, command=("sparq", "paper", "run", "x", "--recipe", "mine.yaml"))
    mine = [dataclasses.replace(r, profile="recipe", provenance=own) for r in plain]
    assert command(experiment, mine) == "sparq paper run sparq-1 --recipe mine.yaml"
    several = [dataclasses.replace(r, seed=seed) for r in plain for seed in (0, 2)]
    assert command(experiment, several) == (
        "for seed in 0 2; do sparq paper run sparq-1 --profile test --seed $seed; done"
    )
    assert command(find_experiment("sparq-4"), several) == "sparq paper run sparq-4 --profile test"
    page = results_page([*plain, *changed, *(dataclasses.replace(r, recipe="c") for r in plain)])
    for records in (plain, changed):
        assert page.count(f"```\n{command(experiment, records)}\n```") == 1


def test_a_group_with_nothing_but_bases_is_left_out() -> None:
    alone = [tasks(Cell(framework="softmax1"), 0, 1, 2, 3, 4)]
    assert "sparq-1: Quantization to W4A4; ours on tiny" not in results_page(alone)


def test_an_empty_file_gives_a_page_that_says_so() -> None:
    page = results_page([])
    assert page.count("Not measured yet.") == page.count("### ")
    assert "Of 128 rows with an average, 17 cannot have come from their own metrics" in page


def test_a_figure_stands_in_its_experiments_section() -> None:
    page = results_page([], ["../x/figures/tiny/sparq-figure-3-outliers.svg"])
    assert page.count("Not measured yet.") == page.count("### ") - 1
    assert "![Outliers by task and adaptation: outliers, tiny](../x/figures/tiny/sparq-figure-3-outliers.svg)" in page


def test_tables_as_markdown() -> None:
    table = Table(
        caption="C", columns=("A", "|b|"), groups=((Line(cells=("x", "1")),),), num_headings=1, notes=("N.", "M.")
    )
    assert markdown(table) == "C:\n\n| A | \\|b\\| |\n| --- | ---: |\n| x | 1 |\n\nN. M."
