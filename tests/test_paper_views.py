"""`sparq paper list`, `show` and `compare`: the published tables, and records beside them."""

import dataclasses
import math
from pathlib import Path

import pytest

from paper_records import record, tasks
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.papers import EXPERIMENTS, Cell, add_records, find_experiment, load_published, read_records, restricted
from sparq.papers.records import summarize_seeds
from sparq.papers.views import comparison, published_table


def test_every_table_and_figure_is_an_experiment() -> None:
    published = load_published()
    names = [e.name for e in EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert [e.name for e in EXPERIMENTS if e.is_printed] == [table.name for table in published.tables]
    assert [(e.paper, e.element) for e in EXPERIMENTS if e.figure and e.paper != "beyond"] == [
        ("case-study", "Figure 1"), ("case-study", "Figure 2"),
        *[("sparq", f"Figure {number}") for number in (1, 2, 3, 4)],
    ]  # fmt: skip


def test_every_published_row_has_a_cell_and_every_cell_a_row() -> None:
    """But for full fine-tuning, which some averages refer to and some tables lack."""
    for table in load_published().tables:
        experiment = find_experiment(table.name)
        cells = experiment.all_cells
        rows = [row.labels for row in table.rows if "framework" in row.labels]
        for labels in rows:
            assert any(cell.is_of(labels) for cell in cells), (table.name, labels)
        for cell in cells:
            lacking = not any(cell.is_of(labels) for labels in rows)
            assert not (lacking and rows) or cell == experiment.base(cell) or cell.framework in ("clipped", "gated"), (
                cell
            )


def test_a_table_shows_both_averages_and_marks_what_disagrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "show", "sparq-2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    marked = [line for line in lines if line[-1:] == ["DISAGREES"]]
    assert len(marked) == 6
    assert marked[0] == [
        "opt-350m",
        "vanilla",
        "lora",
        "full",
        "17.87",
        "51.65",
        "93.91",
        "97.06",
        "233.98",
        "381.00",
        "DISAGREES",
    ]
    assert ["opt-125m", "ours", "lora", "full", "25.77", "62.23", "12.56", "11.80", "3.96", "3.96"] in lines
    assert ["opt-1.3b", "ours", "full", "full", "12.95", "42.48", "8.20", "12.07", "base"] in lines


@pytest.mark.parametrize("table", load_published().tables, ids=lambda table: table.name)
def test_every_table_can_be_shown(table: object, capsys: pytest.CaptureFixture[str]) -> None:
    name, rows = table.name, table.rows  # type: ignore[attr-defined]
    assert main(["paper", "show", name]) == 0
    drawn = published_table(load_published(), table)  # type: ignore[arg-type]
    assert len(drawn.groups[0]) == len(rows)
    assert table.number in capsys.readouterr().out  # type: ignore[attr-defined]


def test_list_and_claims(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "list"]) == 0
    assert sum(line.startswith(("case-study-", "sparq-")) for line in capsys.readouterr().out.splitlines()) == 22
    assert main(["paper", "show", "claims"]) == 0
    assert "107.78" in capsys.readouterr().out


def test_compare_puts_means_over_seeds_beside_the_papers_rows() -> None:
    vanilla, lora = Cell(framework="vanilla"), Cell(framework="softmax1", adaptation="lora")
    base = Cell(framework="softmax1")
    records = [
        tasks(vanilla, 0, 10, 20, 30, 40), tasks(base, 0, 10, 20, 30, 40), tasks(base, 1, 10, 20, 40, 40),
        tasks(lora, 0, 11, 22, 33, 44), tasks(lora, 1, 12, 24, 40, 40),
    ]  # fmt: skip
    table = comparison(load_published(), find_experiment("sparq-2"), records)
    assert table is not None
    lines = {line.cells[:3]: line.cells[3:] for line in table.groups[0]}
    # Seed 0 drops by 10 %, seed 1 by (20 + 20 + 0 + 0) / 4 = 10 %; the papers' framework stands beside softmax1.
    assert lines["softmax1", "lora", "full"][:5] == ("11.50 ± 0.71", "23.00 ± 1.41", "36.50 ± 4.95", "42.00 ± 2.83",
                                                    "10.00 ± 0.00")  # fmt: skip
    assert lines["softmax1", "lora", "full"][5:] == ("3.96", "118.14!", "140.49")
    assert lines["vanilla", "full", "full"] == ("10.00", "20.00", "30.00", "40.00", "base", "base", "base", "base")
    assert set(lines) == {("vanilla", "full", "full"), ("softmax1", "full", "full"), ("softmax1", "lora", "full")}
    assert "Not measured: 6 of 9 models." in " ".join(table.notes)
    assert comparison(load_published(), find_experiment("sparq-3"), records) is None


def test_the_papers_own_backbone_stands_beside_itself() -> None:
    own = dataclasses.replace(tasks(Cell(framework="vanilla"), 0, 1, 2, 3, 4), model="opt-350m")
    table = comparison(load_published(), find_experiment("sparq-2"), [own])
    assert table is not None
    assert [name for name in table.columns if "theirs" in name] == ["theirs opt-350m"]


def test_a_drop_is_over_the_base_of_its_own_seed() -> None:
    cell = Cell(framework="softmax1", precision="w4a4-smoothquant")
    records = [tasks(Cell(framework="softmax1"), 0, 1, 1, 1, 1), tasks(cell, 1, 2, 2, 2, 2)]
    table = comparison(load_published(), find_experiment("sparq-1"), records)
    assert table is not None
    (line,) = [line.cells for line in table.groups[0] if line.cells[:3] == ("softmax1", "full", cell.precision)]
    assert line[7] == "-"


def test_beyond_the_papers_a_drop_is_over_the_model_s_own_full_precision() -> None:
    lora = Cell(framework="softmax1", adaptation="lora")
    low = dataclasses.replace(lora, precision="w4a4-best")
    records = [
        tasks(Cell(framework="softmax1"), 0, 1, 1, 1, 1), tasks(lora, 0, 10, 10, 10, 10), tasks(low, 0, 11, 11, 12, 12),
    ]  # fmt: skip
    experiment = find_experiment("beyond-methods")
    table = comparison(load_published(), experiment, records)
    assert table is not None
    lines = {line.cells[:3]: line.cells[3:] for line in table.groups[0]}
    assert lines["softmax1", "lora", "w4a4-best"] == ("11.00", "11.00", "12.00", "12.00", "15.00")
    assert lines["softmax1", "lora", "full"][-1] == "base"
    assert set(lines) == {("softmax1", kind, "full") for kind in ("full", "lora")} | {("softmax1", "lora", "w4a4-best")}


def test_some_frameworks_alone() -> None:
    (left,) = restricted([find_experiment("sparq-4"), find_experiment("sparq-6")], "framework", ["vanilla"])
    assert left.name == "sparq-6"
    assert {cell.framework for cell in left.all_cells} == {"vanilla"}
    with pytest.raises(SparqError, match="unknown framework of these experiments 'softmax2': did you mean 'softmax1'"):
        restricted(EXPERIMENTS, "framework", ["vanilla", "softmax2"])


def test_a_metric_that_was_not_measured_is_named() -> None:
    cell = Cell(framework="softmax1", precision="w4a4-smoothquant")
    values = {"textlm_ppl": 20.0, "speechlm_ppl": 10.0, "asr_wer": 10.0, "tts_uer": None}
    records = [tasks(Cell(framework="softmax1"), 0, 10, 10, 10, 10), record(cell, 0, **values)]
    table = comparison(load_published(), find_experiment("sparq-1"), records)
    assert table is not None
    (line,) = [line.cells for line in table.groups[0] if line.cells[:3] == ("softmax1", "full", cell.precision)]
    assert line[6:8] == ("N/A", "33.33")
    assert "Averages leave out what a row lacks: TTS UER %." in table.notes


def test_means_and_deviations() -> None:
    cell = Cell(framework="vanilla")
    found = summarize_seeds(
        [record(cell, seed, accuracy=value) for seed, value in enumerate((1.0, 2.0, 6.0))], "accuracy"
    )
    assert found is not None
    assert (found.mean, found.seeds) == (3.0, (0, 1, 2))
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    one = summarize_seeds([record(cell, accuracy=1.0), record(cell, 1, accuracy=None)], "accuracy")
    assert one is not None
    assert (one.mean, one.deviation) == (1.0, None)
    assert summarize_seeds([record(cell, accuracy=None)], "accuracy") is None
    broken = summarize_seeds([record(cell, accuracy=1.0), record(cell, 1, accuracy=math.inf)], "accuracy")
    assert broken is not None
    assert math.isinf(broken.mean)
    assert broken.deviation is not None
    assert math.isnan(broken.deviation)


def test_records_accumulate_and_replace_their_like(tmp_path: Path) -> None:
    file, cell = tmp_path / "results.jsonl", Cell(framework="vanilla")
    assert read_records(file) == []
    first = [record(cell, 0, accuracy=math.nan), record(cell, 1, accuracy=2.0)]
    add_records(file, first)
    again = dataclasses.replace(record(cell, 0, accuracy=math.inf), note="again")
    add_records(file, [again, record(dataclasses.replace(cell, rank=4), 0, accuracy=None)])
    found = read_records(file)
    assert found[0] == again
    assert [(r.seed, r.cell.rank, r.values["accuracy"]) for r in found[1:]] == [(1, 0, 2.0), (0, 4, None)]
    file.write_text('{"profile": "test"}\n')
    with pytest.raises(SparqError, match="line 1 lacks key 'model'"):
        read_records(file)
    file.unlink()
    add_records(file, first[1:])
    file.write_text(file.read_text().replace('"tasks"', '"taks"'))
    with pytest.raises(SparqError, match="line 1.measure is 'taks': did you mean 'tasks'"):
        read_records(file)
    file.write_text("not json\n")
    with pytest.raises(SparqError, match="line 1 is not JSON"):
        read_records(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sparq-22"], "unknown experiment 'sparq-22'"),
        (["show", "sparq-figure-3"], "sparq-figure-3 has no numbers"),
        (["show", "beyond-methods"], "beyond-methods has no numbers"),
        (["compare", "nothing.jsonl"], "nothing.jsonl has no results"),
        (["compare", "--experiment", "table"], "unknown experiment 'table'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"sparq: error: {message}")


def test_compare_prints_a_table_for_each_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_records(tmp_path / "r.jsonl", [tasks(Cell(framework="vanilla"), 0, 1, 2, 3, 4)])
    assert main(["paper", "compare", str(tmp_path / "r.jsonl"), "--experiment", "sparq-1", "sparq-2"]) == 0
    out = capsys.readouterr().out
    assert "sparq-1: Quantization to W4A4; ours on tiny, small" in out
    assert "sparq-2: LoRA and QLoRA; ours on tiny, small" in out
    assert main(["paper", "compare", str(tmp_path / "r.jsonl"), "--experiment", "sparq-3"]) == 2
