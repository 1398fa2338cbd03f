"""The sentences that open a report."""

from dataclasses import replace

import pytest

from report_records import bare, outliers, row
from sparq.report import ErrorRate, Perplexity, Row, TaskOutliers, summarize
from sparq.report.tables import main_table


def _four(framework: str, precision: str, value: float, **changes: object) -> Row:
    return row(
        0, framework, precision,
        **{
            "textlm_ppl": Perplexity(value=value, tokens=1, utterances=1, split="test"),
            "speechlm_ppl": Perplexity(value=value, tokens=1, utterances=1, split="test"),
            "asr_wer": ErrorRate(value=value, errors=1, length=1, utterances=1, split="test"),
            "tts_cer": ErrorRate(value=value, errors=1, length=1, utterances=1, split="test"),
            **changes,
        },
    )  # fmt: skip


@pytest.mark.parametrize(("vanilla", "softmax1", "best"), [(40, 15, "softmax1"), (15, 40, "vanilla")])
def test_the_summary_names_whoever_loses_least(vanilla, softmax1, best):
    rows = [_four(f, "full", 10.0) for f in ("vanilla", "softmax1")]
    rows += [_four("vanilla", "w4a4-rtn", vanilla), _four("softmax1", "w4a4-rtn", softmax1)]
    rows += [_four("vanilla", "w8a8-rtn", 10), _four("softmax1", "w8a8-rtn", 99)]
    sentences = "\n".join(summarize(bare(tuple(rows))))
    assert f"At W4A4 RTN, {best} loses least against its own full precision: +50.00 % on average over 4/4" in sentences
    assert "against +300.0 %" in sentences
    assert f"{best} recognizes speech best: 15.00 % WER" in sentences
    assert "W8A8" not in sentences


def test_nobody_recognizes_best_what_nobody_recognizes():
    rows = [_four(f, "full", 10.0) for f in ("vanilla", "softmax1")]
    rows += [_four("vanilla", "w4a4-rtn", 99.84), _four("softmax1", "w4a4-rtn", 109.5)]
    sentences = "\n".join(summarize(bare(tuple(rows))))
    assert "recognizes speech best" not in sentences
    assert (
        "At W4A4 RTN speech is not recognized any more: 99.84 % WER with vanilla and 109.5 % WER with softmax1."
        in sentences
    )


def test_the_summary_ranks_neither_ties_nor_different_metrics():
    rows = [_four(f, "full", 10.0) for f in ("vanilla", "softmax1")]
    tie = summarize(bare((*rows, *(_four(f, "w4a4-rtn", 20) for f in ("vanilla", "softmax1")))))
    assert any("no framework alone loses least" in s for s in tie)
    assert not any("recognizes speech best" in s for s in tie)
    missing = (_four("vanilla", "w4a4-rtn", 20), _four("softmax1", "w4a4-rtn", 15, tts_cer=None))
    assert any("do not compare: vanilla +100.0 % (4/4) and softmax1 +50.00 % (3/4)" in s
               for s in summarize(bare((*rows, *missing))))  # fmt: skip
    table = main_table(bare((*rows, *missing)))
    assert not any(line.strong for group in table.groups for line in group)


def test_the_largest_activation_is_that_of_every_task() -> None:
    spoken = TaskOutliers(max_inf_norm=7_318, mean_kurtosis=9, tokens=4)
    own = outliers(1_711)
    rows = (
        row(0, "vanilla", "full", outliers=outliers(10_130)),
        row(0, "softmax1", "full", outliers=replace(own, by_task={"SpeechLM": spoken})),
    )
    *_, last = summarize(bare(rows))
    assert last == (
        "The largest activation at full precision is 10,130 with vanilla and 7,318 with softmax1:"
        " 1.38 times less with softmax1 than with vanilla."
    )
