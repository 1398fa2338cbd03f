import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparq.errors import SparqError
from sparq.report import (
    SCHEMA_VERSION,
    AttentionMap,
    ErrorRate,
    HiddenMap,
    Perplexity,
    Provenance,
    Results,
    Row,
    average_drop,
    collect_provenance,
    drops,
    matrix,
    read_results,
    row_drop,
    utc_now,
    write_results,
)
from sparq.report.codec import from_json, to_json
from sparq.report.provenance import source_version

METRICS = ("textlm_ppl", "speechlm_ppl", "asr_wer", "tts_uer")

# SpARQ table 1 (OPT-125m): the four metrics, the printed drop, and what the formula gives where that differs.
OPT_125M = {
    "vanilla": (
        (22.56, 59.42, 12.40, 12.08),
        [
            ((22.63, 59.53, 12.46, 12.38), 0.85, None),
            ((22.61, 59.52, 12.42, 12.37), 0.74, None),
            ((22.62, 59.53, 12.44, 12.38), 0.81, None),
            ((45.23, 96.87, 52.31, 48.79), 197.31, None),
            ((31.25, 80.19, 29.44, 28.34), 86.37, None),
            ((31.28, 80.21, 31.98, 29.55), 94.04, None),
        ],
    ),
    "SpARQ": (
        (22.70, 59.45, 12.61, 12.11),
        [
            ((22.71, 59.49, 12.64, 12.18), 0.23, None),
            ((22.71, 59.48, 12.62, 12.13), 0.08, None),
            ((22.71, 59.49, 12.63, 12.14), 0.13, None),
            ((37.14, 84.55, 35.32, 36.73), 112.05, 122.31),
            ((26.11, 68.42, 14.33, 15.71), 18.52, 18.37),
            ((26.12, 68.63, 14.53, 16.01), 19.63, 19.48),
        ],
    ),
}


def ppl(value: float, tokens: int = 100, split: str = "test") -> Perplexity:
    return Perplexity(value=value, tokens=tokens, utterances=10, split=split)


def rate(value: float, length: int = 100) -> ErrorRate:
    return ErrorRate(value=value, errors=12, length=length, utterances=10, split="test")


def make_row(framework: str, precision: str, values: tuple[float, float, float, float], **changes: object) -> Row:
    textlm, speechlm, asr, tts = values
    metrics = {
        "textlm_ppl": ppl(textlm),
        "speechlm_ppl": ppl(speechlm),
        "asr_wer": rate(asr),
        "tts_uer": rate(tts),
    }
    return Row(framework=framework, precision=precision, **{**metrics, **changes})


PROVENANCE = Provenance(
    git_hash="0" * 40, git_dirty=False, packages={"python": "3.11"}, platform="Linux", cpu="a CPU",
    num_cpus=2, num_threads=1, memory_bytes=2**33, command=("sparq", "demo"),
)  # fmt: skip


def make_results(*rows: Row, **changes: object) -> Results:
    required = {
        "name": "test", "created": "2026-01-01T00:00:00+00:00", "provenance": PROVENANCE, "seed": 0,
        "settings": {}, "corpus": {}, "rows": rows,
    }  # fmt: skip
    return Results(**{**required, **changes})


@pytest.mark.parametrize(
    ("base", "values", "printed", "computed"),
    [(base, *row) for base, rows in OPT_125M.values() for row in rows],
)
def test_drop_is_that_of_the_papers_own_rows(base, values, printed, computed):
    drop = average_drop(dict(zip(METRICS, values, strict=True)), dict(zip(METRICS, base, strict=True)))
    assert drop.fraction_used == "4/4"
    # The metrics are printed to 0.01, so each may be off by 0.005, and so may the drop.
    slack = 0.005 + sum(100 / 4 * 0.005 * (1 + v / b) / b for v, b in zip(values, base, strict=True))
    if computed is None:
        assert drop.percent == pytest.approx(printed, abs=slack)
    else:
        assert round(drop.percent, 2) == computed
        assert abs(computed - printed) > slack, "rounding would explain the printed number"


def test_the_first_row_of_the_papers():
    base, rows = OPT_125M["vanilla"]
    drop = average_drop(dict(zip(METRICS, rows[3][0], strict=True)), dict(zip(METRICS, base, strict=True)))
    assert round(drop.percent, 1) == 197.3


@given(
    base=st.lists(st.floats(0.01, 1e6), min_size=4, max_size=4),
    factor=st.floats(0.01, 1e6),
    scale=st.floats(0.01, 100),
)
def test_drop_of_a_common_factor_is_that_factor_whatever_the_units(base, factor, scale):
    before = dict(zip(METRICS, base, strict=True))
    after = {name: value * factor for name, value in before.items()}
    assert average_drop(after, before).percent == pytest.approx(100 * (factor - 1), rel=1e-9, abs=1e-9)
    before["asr_wer"] *= scale
    after["asr_wer"] *= scale
    assert average_drop(after, before).percent == pytest.approx(100 * (factor - 1), rel=1e-9, abs=1e-9)


def test_left_out_metrics_are_counted_and_named():
    base = {"textlm_ppl": 10.0, "speechlm_ppl": math.inf, "asr_wer": 0.0, "tts_uer": None}
    drop = average_drop({"textlm_ppl": 15.0, "speechlm_ppl": 5.0, "asr_wer": 5.0, "tts_uer": 5.0}, base)
    assert (drop.percent, drop.used, drop.fraction_used) == (50.0, ("textlm_ppl",), "1/4")
    assert drop.left_out == {
        "speechlm_ppl": "inf at full precision",
        "asr_wer": "0 at full precision",
        "tts_uer": "not measured at full precision",
    }
    nothing = average_drop({"asr_wer": None}, {"asr_wer": 3.0})
    assert (nothing.percent, nothing.fraction_used) == (None, "0/1")


def test_a_broken_model_cannot_look_better_by_being_left_out():
    base = {"textlm_ppl": 10.0, "asr_wer": 10.0}
    assert average_drop({"textlm_ppl": math.inf, "asr_wer": 11.0}, base).percent == math.inf
    assert math.isnan(average_drop({"textlm_ppl": math.nan, "asr_wer": 11.0}, base).percent)


def test_metrics_counted_over_other_data_are_left_out():
    base = make_row("vanilla", "full", (10, 10, 10, 10))
    row = make_row("vanilla", "w4a4-rtn", (20, 20, 20, 20), textlm_ppl=ppl(99, tokens=7), asr_wer=rate(99, length=7))
    drop = row_drop(row, base)
    assert drop.percent == 100
    assert drop.fraction_used == "2/4"
    assert set(drop.left_out.values()) == {"counted over other data than at full precision"}


def test_tts_counts_by_what_is_heard_where_anybody_listened():
    base = make_row("vanilla", "full", (10, 10, 10, 10), tts_cer=rate(20))
    row = make_row("vanilla", "w4a4-rtn", (10, 10, 10, 90), tts_cer=rate(28))
    drop = row_drop(row, base)
    assert drop.used == ("textlm_ppl", "speechlm_ppl", "asr_wer", "tts_cer")
    assert drop.percent == pytest.approx(100 * 0.4 / 4)
    # One row of a run without it does not fall back to units: the mean would be of other things.
    deaf = make_row("softmax1", "w4a4-rtn", (10, 10, 10, 90))
    results = make_results(base, row, make_row("softmax1", "full", (10, 10, 10, 10)), deaf)
    assert drops(results)["softmax1-w4a4-rtn"].left_out == {"tts_cer": "not measured"}


def test_each_framework_is_compared_with_itself():
    results = make_results(
        make_row("softmax1", "w4a4-rtn", (30, 30, 30, 30)),
        make_row("vanilla", "w4a4-rtn", (20, 20, 20, 20)),
        make_row("softmax1", "full", (20, 20, 20, 20)),
        make_row("vanilla", "full", (10, 10, 10, 10)),
        make_row("max_shift", "w4a4-rtn", (20, 20, 20, 20)),
    )
    assert {key: drop.percent for key, drop in drops(results).items()} == {
        "vanilla-w4a4-rtn": 100,
        "softmax1-w4a4-rtn": 50,
    }
    assert [row.key for row in results.ordered_rows()] == [
        "vanilla-full", "vanilla-w4a4-rtn", "softmax1-full", "softmax1-w4a4-rtn", "max_shift-w4a4-rtn",
    ]  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def maps(draw, kind):
    labels = draw(st.lists(st.text(max_size=3), min_size=1, max_size=3))

    def values(width: int):
        return tuple(tuple(draw(st.floats()) for _ in range(width)) for _ in labels)

    channels = draw(st.integers(1, 3))
    if kind is AttentionMap:
        return attention_map(labels=tuple(labels), weights=values(len(labels)), values=values(channels))
    return HiddenMap(framework="vanilla", norms=values(channels), labels=tuple(labels))


def attention_map(**changes: object) -> AttentionMap:
    given = {"framework": "vanilla", "layer": 1, "head": 2, "outputs": tuple((1.0, 2.0) for _ in changes["labels"])}
    return AttentionMap(**{**given, **changes})


all_results = st.builds(
    Results,
    settings=st.dictionaries(st.text(), json_values, max_size=3),
    rows=st.lists(st.from_type(Row), max_size=2, unique_by=lambda row: row.key).map(tuple),
    attention_maps=st.lists(maps(AttentionMap), max_size=1).map(tuple),
    hidden_maps=st.lists(maps(HiddenMap), max_size=1).map(tuple),
    schema_version=st.just(SCHEMA_VERSION),
)


@settings(max_examples=40)
@given(all_results)
def test_results_survive_json(results):
    text = json.dumps(to_json(results), allow_nan=False)
    back = from_json(json.loads(text))
    # NaN differs from itself, so the comparison is between the JSON forms.
    assert to_json(back) == to_json(results)
    assert type(back.rows) is tuple


def test_infinity_and_nan_survive_the_file(tmp_path: Path):
    row = make_row("vanilla", "full", (math.inf, -math.inf, math.nan, 1.5))
    path = tmp_path / "deep" / "results.json"
    write_results(path, make_results(row, settings={"clip": math.inf}))
    assert '"value": "inf"' in path.read_text()
    back = read_results(path)
    assert back.rows[0].textlm_ppl.value == math.inf
    assert back.rows[0].speechlm_ppl.value == -math.inf
    assert math.isnan(back.rows[0].asr_wer.value)
    assert back.settings == {"clip": "inf"}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_lists_of_numbers_take_one_line_and_text_is_untouched(tmp_path: Path):
    weights = matrix(np.array([[1.0, 0.0], [1 / 3, 2 / 3]]))
    found = attention_map(weights=weights, values=weights, labels=("[\n 1,", "2 ]"))
    write_results(tmp_path / "r.json", make_results(attention_maps=(found,)))
    assert "[ 0.3333, 0.6667 ]" in (tmp_path / "r.json").read_text()
    assert read_results(tmp_path / "r.json").attention_maps == (found,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j: j.update(schema_version=1), "results have schema_version 1: this sparq reads 3"),
        (lambda j: j.pop("schema_version"), "schema_version None"),
        (lambda j: j.update(sed=3), "unknown key 'sed': did you mean 'seed'?"),
        (lambda j: j.pop("seed"), "results lacks key 'seed'"),
        (lambda j: j.update(seed=1.5), "results.seed is 1.5: an integer is needed"),
        (lambda j: j.update(seed=True), "results.seed is True: an integer is needed"),
        (
            lambda j: j["rows"][0].update(framework=None),
            r"results.rows\[0\].framework is None: a string is needed",
        ),
        (lambda j: j["rows"][0]["asr_wer"].update(value="12"), "asr_wer.value is '12': a number is needed"),
        (lambda j: j["rows"][0]["asr_wer"].update(value=True), "asr_wer.value is True: a number is needed"),
        (lambda j: j.update(rows={}), "results.rows is {}: a list is needed"),
        (lambda j: j["rows"].append(j["rows"][0]), "row 'vanilla-full' twice"),
    ],
)
def test_reading_is_strict_and_says_where(tmp_path: Path, change, message):
    value = to_json(make_results(make_row("vanilla", "full", (1, 2, 3, 4))))
    change(value)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    with pytest.raises(SparqError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], None, "results", 1])
def test_other_json_is_refused(value):
    with pytest.raises(SparqError, match="schema_version None"):
        from_json(value)


def test_maps_need_a_rectangle_with_labels():
    with pytest.raises(SparqError, match=r"rows of lengths \[1, 2\]"):
        attention_map(weights=((1.0,), (0.5, 0.5)), values=((1.0,),) * 2, labels=("a", "b"))
    with pytest.raises(SparqError, match="2 x 2 but has 3 labels"):
        attention_map(weights=((0.5, 0.5),) * 2, values=((1.0,),) * 3, labels=("a", "b", "c"))
    with pytest.raises(SparqError, match="v, values is 1 x 1 but has 2 labels"):
        attention_map(framework="v", weights=((0.5, 0.5),) * 2, values=((1.0,),), labels=("a", "b"))
    with pytest.raises(SparqError, match="1 x 2 but has 2 labels"):
        HiddenMap(framework="v", norms=((0.5, 0.5),), labels=("a", "b"))


def test_provenance_of_here():
    provenance = collect_provenance()
    assert provenance.packages["numpy"] == np.__version__
    assert set(provenance.packages) == {
        "python", "sparq", "torch", "transformers", "peft", "numpy", "sentencepiece",
    }  # fmt: skip
    assert provenance.num_threads >= 1
    assert provenance.cpu
    assert provenance.memory_bytes > 2**28
    assert "/" not in provenance.command[0]
    assert (provenance.git_dirty is None) == (provenance.git_hash == "unknown")
    assert utc_now().endswith("+00:00")


def test_the_commit_is_that_of_the_file_and_of_no_other_repository(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code, copy = tmp_path / "code.py", tmp_path / "venv" / "code.py"
    copy.parent.mkdir()
    for file in (code, copy):
        file.write_text("1\n")
    assert source_version(code) == ("unknown", None)
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-qm", "first")
    assert source_version(code) == (git("rev-parse", "HEAD"), False)
    assert source_version(copy) == ("unknown", None)
    code.write_text("2\n")
    assert source_version(code) == (git("rev-parse", "HEAD"), True)
