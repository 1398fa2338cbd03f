"""Numbers, labels and transcripts as a report shows them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparq.report import PRECISIONS
from sparq.report.align import align
from sparq.report.numbers import precision_label, show_bytes, show_change, show_number, show_seconds
from sparq.report.svg import printable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), (0, "0.00"), (12.4, "12.40"), (99.996, "100.0"), (348.24, "348.2"), (999.96, "1,000"),
        (12_700.4, "12,700"), (999_999.7, "1.0e6"), (1.34e7, "1.3e7"), (2e120, "2.0e120"), (-5.5, "-5.50"),
        (3.1e-7, "3.1e-7"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_take_few_characters(value, shown):
    assert show_number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_shown_numbers_are_near_and_short(value):
    text = show_number(value)
    assert len(text) <= 9
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.05, abs=0.00501)


def test_other_labels():
    assert [show_change(x) for x in (None, 0, -3, 197.31)] == ["-", "0.00", "-3.00", "+197.3"]
    assert [show_seconds(x) for x in (8.44, 59.96, 725, 7380)] == [
        "8.4 s",
        "1 min 00 s",
        "12 min 05 s",
        "2 h 03 min",
    ]
    assert [show_bytes(x) for x in (2**12, 2**22, 2**31)] == ["4 KiB", "4 MiB", "2.00 GiB"]
    assert [precision_label(x) for x in PRECISIONS] == [
        "full", "W8A8 RTN", "W8A8 SmoothQuant", "W4A4 RTN", "W4A4 SmoothQuant",
    ]  # fmt: skip
    assert printable("a" * 30) == "a" * 13 + "…"


words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=5).map(" ".join)


@given(words, words)
def test_alignment_holds_both_texts_and_fewest_edits(reference, hypothesis):
    segments = align(reference, hypothesis)
    expected = [w for s in segments if s.kind != "inserted" for w in s.text.split()]
    heard = [w for s in segments if s.kind != "deleted" for w in s.text.split()]
    assert (expected, heard) == (reference.split(), hypothesis.split())
    # A substitution is a deletion beside an insertion: count runs of wrong words by their longer side.
    edits = deleted = inserted = 0
    for segment in (*segments, None):
        if segment is None or segment.kind == "equal":
            edits += max(deleted, inserted)
            deleted = inserted = 0
        elif segment.kind == "deleted":
            deleted += len(segment.text.split())
        else:
            inserted += len(segment.text.split())
    assert edits == _edit_distance(reference.split(), hypothesis.split())


def _edit_distance(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return len(left) + len(right)
    return min(
        _edit_distance(left[1:], right) + 1,
        _edit_distance(left, right[1:]) + 1,
        _edit_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )
