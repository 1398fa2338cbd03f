"""Tables and figures of outliers from records made by hand."""

import math
import re

from report_records import bare, outliers, row
from sparq.report import AttentionMap, Outliers, Row, TaskOutliers
from sparq.report.alt import alternatives
from sparq.report.heatmaps import _PARTS, _top
from sparq.report.outlier_tables import outlier_tables
from sparq.report.plots import _places, outlier_bars
from sparq.report.results import FRAMEWORKS
from sparq.report.tables import WIDTH, draw


def found(norm: float, **tasks: TaskOutliers) -> Outliers:
    return Outliers(
        max_inf_norm=norm, mean_kurtosis=7 * norm, attention_mass=0.75, first_token_share=0.5, sink_rate=0.625,
        attention_entropy=1.25, max_logit=88.5, first_value_norm=0.25, sink_value_norm=None, other_value_norm=3.5,
        tokens=1234, by_task=tasks,
    )  # fmt: skip


def task(norm: float) -> TaskOutliers:
    return TaskOutliers(max_inf_norm=norm, mean_kurtosis=norm / 2, tokens=int(norm) + 1)


def test_no_outliers_make_no_table_and_no_figure() -> None:
    nothing = bare((Row(framework="vanilla", precision="full"),))
    assert outlier_tables(nothing) == []
    assert outlier_bars(nothing) is None


def test_every_figure_has_its_column() -> None:
    norms, attention = outlier_tables(bare((Row(framework="mine", precision="w4a4-rtn", outliers=found(64)),)))
    cells = dict(zip(norms.columns, norms.groups[0][0].cells, strict=True))
    assert cells == {
        "Framework": "mine", "Precision": "W4A4 RTN", "Max inf norm": "64.00", "After final norm": "-",
        "Mean kurtosis": "448.0", "Tokens": "1,234",
    }  # fmt: skip
    cells = dict(zip(attention.columns, attention.groups[0][0].cells, strict=True))
    assert cells == {
        "Framework": "mine", "Precision": "W4A4 RTN", "Row mass": "0.7500", "First token": "0.5000", "Sinks": "0.6250",
        "Entropy": "1.25", "Max logit": "88.50", "|v| first": "0.25", "|v| sinks": "-", "|v| rest": "3.50",
    }  # fmt: skip


def test_tasks_stand_apart_and_a_missing_one_is_named() -> None:
    results = bare(
        (
            Row(framework="vanilla", precision="full", outliers=found(64, TextLM=task(10), ASR=task(30))),
            Row(framework="vanilla", precision="w8a8-rtn", outliers=found(64)),
            Row(framework="softmax1", precision="full", outliers=found(32, TextLM=task(20))),
        )
    )
    *_, tasks = outlier_tables(results)
    assert tasks.columns == ("Framework", "Precision", "TextLM", "ASR")
    assert [line.cells for group in tasks.groups for line in group] == [
        ("vanilla", "full", "10.00 / 5.00", "30.00 / 15.00"),
        ("softmax1", "full", "20.00 / 10.00", "-"),
    ]
    assert tasks.notes == ("TextLM: 11 or 21 tokens.", "ASR: 31 tokens.")
    text = re.findall(r">([^<>]+)</text>", str(outlier_bars(results)))
    assert {"TextLM", "ASR", "10.00", "30.00", "20.00"} <= set(text)
    assert not {"64.00", "32.00"} & set(text)
    assert "vanilla ASR 30.00 and 15.00" in alternatives(results)["outlier_bars"]


def test_one_task_alone_is_no_group() -> None:
    results = bare((Row(framework="vanilla", precision="full", outliers=found(64, TextLM=task(64))),))
    assert len(outlier_tables(results)) == 2
    text = re.findall(r">([^<>]+)</text>", str(outlier_bars(results)))
    assert "TextLM" not in text


def test_the_widest_rows_fit_a_terminal() -> None:
    rows = tuple(row(0, name, "w4a4-smoothquant", outliers=outliers(123_456.7)) for name in FRAMEWORKS)
    tables = outlier_tables(bare(rows))
    assert len(tables) == 3
    assert max(len(line) for table in tables for line in draw(table).splitlines()) <= WIDTH


def test_frameworks_look_different() -> None:
    assert _places(FRAMEWORKS) == {"vanilla": 0, "softmax1": 1, "max_shift": 2}
    assert _places(["softmax1", "a", "b"]) == {"softmax1": 1, "a": 3, "b": 4}
    six = [f"model {n}: vanilla" for n in range(6)]
    assert sorted(_places(six).values()) == list(range(6))
    assert len(_places([*six, "another"])) == 7


def attention_map(framework: str, top: float) -> AttentionMap:
    numbers = ((top, top / 3), (0.0, math.nan))
    return AttentionMap(
        framework=framework, layer=0, head=0, weights=numbers, values=numbers, outputs=numbers, labels=("a", "b")
    )


def test_scales_end_at_round_numbers() -> None:
    probability, value, output = _PARTS
    maps = [attention_map("vanilla", 0.03), attention_map("softmax1", 6.1)]
    assert _top(probability, maps) == 1
    assert _top(value, maps) == _top(output, maps) == 10
    assert _top(value, maps[:1]) == 0.05
    assert _top(value, [attention_map("vanilla", 0.0)]) == 1
    assert _top(value, [attention_map("vanilla", 5.0)]) == 5
