"""The papers' numbers as data: whole, consistent with themselves where they are, and marked where they are not."""

import itertools
import math

import pytest

from sparq.errors import SparqError
from sparq.papers.published import load_published, recompute, recompute_claim

PUBLISHED = load_published()
ROWS = {"case-study-1": 28, "case-study-2": 12, "case-study-3": 8, "case-study-4": 8, "sparq-1": 24, "sparq-2": 18,
        "sparq-3": 4, "sparq-4": 4, "sparq-5": 8, "sparq-6": 42, "sparq-g1": 8, "sparq-7": 2, "sparq-8": 6,
        "sparq-9": 12, "sparq-10": 4, "sparq-11": 3}  # fmt: skip

# Printed and computed.
DISAGREE = {
    ("case-study-1", "opt-125m", "ours", "full", "w4a4-smoothquant"): (112.05, 122.31),
    ("case-study-1", "opt-125m", "ours", "full", "w4a4-affinequant"): (18.52, 18.37),
    ("case-study-1", "opt-125m", "ours", "full", "w4a4-omniquant"): (19.63, 19.48),
    ("sparq-1", "opt-125m", "ours", "full", "w4a4-smoothquant"): (112.05, 122.31),
    ("sparq-1", "opt-125m", "ours", "full", "w4a4-affinequant"): (18.52, 18.37),
    ("sparq-1", "opt-125m", "ours", "full", "w4a4-omniquant"): (19.63, 19.48),
    ("sparq-6", "opt-125m", "ours", "full", "w4a4-smoothquant"): (112.05, 122.31),
    ("sparq-6", "opt-125m", "ours", "full", "w4a4-affinequant"): (18.52, 18.37),
    ("sparq-6", "opt-125m", "ours", "full", "w4a4-omniquant"): (19.63, 19.48),
    ("sparq-2", "opt-350m", "vanilla", "lora", "full"): (233.98, 381.00),
    ("sparq-2", "opt-350m", "vanilla", "qlora", "full"): (211.49, 330.41),
    ("sparq-2", "opt-350m", "ours", "lora", "full"): (106.68, 118.14),
    ("sparq-2", "opt-350m", "ours", "qlora", "full"): (123.93, 135.99),
    ("sparq-2", "opt-1.3b", "vanilla", "qlora", "full"): (369.20, 297.93),
    ("sparq-2", "opt-1.3b", "ours", "qlora", "full"): (290.16, 290.69),
    ("sparq-9", "opt-350m", "vanilla", "full", "w4a4-smoothquant-clip1"): (267.56, 242.56),
    ("sparq-9", "opt-350m", "ours", "full", "w8a8-smoothquant-clip5"): (55.75, 56.06),
}  # fmt: skip


def test_every_table_is_there_with_all_rows() -> None:
    assert {table.name: len(table.rows) for table in PUBLISHED.tables} == ROWS
    for table in PUBLISHED.tables:
        assert table.paper in PUBLISHED.papers
        assert set(table.metrics) <= set(PUBLISHED.metrics)
        for row in table.rows:
            assert list(row.values) == list(table.metrics)
            assert table.row(row.labels) is row
            assert (row.average_drop is None) == (row.base is None)
            assert all(value is None or value > 0 for value in row.values.values())


def test_an_average_is_the_mean_of_four_relative_increases() -> None:
    """Computed here once more, by hand for a row and in one expression for all."""
    row = PUBLISHED.table("sparq-2").rows[1]
    by_hand = 100 * (25.69 / 22.56 + 62.16 / 59.42 + 12.39 / 12.40 + 15.47 / 12.08 - 4) / 4
    found = recompute(PUBLISHED, row)
    assert found is not None
    assert found.percent == pytest.approx(by_hand, rel=1e-12)
    assert found.lowest < found.percent < found.highest
    for table in PUBLISHED.tables:
        for row in table.rows:
            if (found := recompute(PUBLISHED, row)) is not None:
                base = PUBLISHED.base_row(row)
                ratios = [row.values[metric] / base.values[metric] for metric in table.metrics]
                assert found.percent == pytest.approx(25 * (math.fsum(ratios) - 4), rel=1e-9)


def test_the_rows_that_disagree_with_themselves() -> None:
    """128 rows have an average and 17 of them cannot have come from their metrics.

    The text that the tables were read from has the OmniQuant row of SpARQ in table 1 twice for each model. Counted
    with these three repetitions it is 131 rows and 18.
    """
    found, averages = {}, 0
    for table in PUBLISHED.tables:
        for row in table.rows:
            recomputed = recompute(PUBLISHED, row)
            averages += recomputed is not None
            if recomputed is not None and not recomputed.agrees:
                labels = [str(row.labels[name]) for name in ("model", "framework", "adaptation", "precision")]
                found[table.name, *labels] = (row.average_drop, round(recomputed.percent, 2))
    assert averages == 128
    assert found == DISAGREE


def test_rounding_alone_is_no_disagreement() -> None:
    """The worst rounding of nine printed numbers is covered: all 2^8 corners of a row lie between the bounds."""
    row = PUBLISHED.table("sparq-6").rows[1]
    found, base = recompute(PUBLISHED, row), PUBLISHED.base_row(row)
    assert found is not None
    values, bases = list(row.values.values()), list(base.values.values())
    corners = [
        25 * sum((v + s) / (b + t) - 1 for v, b, s, t in zip(values, bases, signs[:4], signs[4:], strict=True))
        for signs in itertools.product((-0.005, 0.005), repeat=8)
    ]
    assert min(corners) == pytest.approx(found.lowest)
    assert max(corners) == pytest.approx(found.highest)
    assert found.agrees
    assert abs(found.percent - row.average_drop) > 0.005  # so the bounds are needed


def test_tables_that_repeat_each_other_say_the_same() -> None:
    """SpARQ table 1 is a part of table 6, and the case study's ranks are SpARQ's."""
    whole = {tuple(row.labels.items()): row for row in PUBLISHED.table("sparq-6").rows}
    for row in PUBLISHED.table("sparq-1").rows:
        assert whole[tuple(row.labels.items())].values == row.values
    assert PUBLISHED.table("case-study-3").rows == PUBLISHED.table("sparq-5").rows


def test_claims_of_the_text_against_the_tables() -> None:
    """Each number of the text is what its rows give, to its printed digits, but for four."""
    wrong = {}
    for claim in PUBLISHED.claims:
        value = recompute_claim(PUBLISHED, claim)
        digits = 0 if claim.value == int(claim.value) else 2
        if value is None or round(value, digits) != claim.value:
            wrong[claim.value] = None if value is None else round(value, 2)
    assert wrong == {36.61: 36.90, 7.98: None, 107.78: 157.92, 64.96: 78.97}


def test_an_unknown_table_is_one_line() -> None:
    with pytest.raises(SparqError, match="unknown table 'sparq-12': did you mean"):
        PUBLISHED.table("sparq-12")
