"""Held-out parts: disjoint, reproducible, and as large as asked for."""

import dataclasses
import math
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparq.audio.manifest import Utterance
from sparq.audio.splits import HeldOut, assign_splits
from sparq.errors import SparqError


def _utterances(counts: list[int]) -> list[Utterance]:
    return [
        Utterance(id=f"u{speaker}-{i}", path=Path("a.wav"), speaker=f"s{speaker}")
        for speaker, count in enumerate(counts)
        for i in range(count)
    ]


def _splits(utterances: list[Utterance]) -> dict[str, str]:
    return {u.id: u.split for u in utterances}


_COUNTS = st.lists(st.integers(1, 9), min_size=4, max_size=20)
# Built inside the tests: a type checker may draw random items of a tuple, which a strategy must not do.
_RULES = st.fixed_dictionaries(
    {
        "test_fraction": st.floats(0, 0.3),
        "valid_fraction": st.floats(0, 0.2),
        "speaker_disjoint": st.booleans(),
        "test_split": st.sampled_from(["test", "test-unseen"]),
        "seed": st.integers(0, 5),
    }
)


def _assign(utterances: list[Utterance], rule: HeldOut) -> list[Utterance] | None:
    try:
        return assign_splits(utterances, rule)
    except SparqError as error:
        if "too few" not in str(error):
            raise
        return None


@given(_COUNTS, _RULES, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(counts: list[int], settings: dict[str, Any], random_: random.Random) -> None:
    rule = HeldOut(**settings)
    utterances = _utterances(counts)
    shuffled = random_.sample(utterances, len(utterances))
    first, second = _assign(utterances, rule), _assign(shuffled, rule)
    if first is None or second is None:
        assert first == second
        return
    assert _splits(first) == _splits(second)
    assert [u.id for u in second] == [u.id for u in shuffled]
    assert [dataclasses.replace(u, split="") for u in first] == utterances


@given(_COUNTS, _RULES)
def test_sizes_and_disjoint_speakers(counts: list[int], settings: dict[str, Any]) -> None:
    rule = HeldOut(**settings)
    utterances = _utterances(counts)
    assigned = _assign(utterances, rule)
    if assigned is None:
        return
    sizes = Counter(u.split for u in assigned)
    assert set(sizes) <= {"train", "valid", rule.test_split}
    num_test = sizes[rule.test_split]
    wanted = math.ceil(Decimal(str(rule.test_fraction)) * len(utterances))
    if rule.speaker_disjoint:
        tested = {u.speaker for u in assigned if u.split == rule.test_split}
        assert not tested & {u.speaker for u in assigned if u.split != rule.test_split}
        largest = max((counts[int(s[1:])] for s in tested), default=0)
        assert wanted <= num_test < wanted + max(largest, 1)
    else:
        assert num_test == wanted
    assert sizes["valid"] == math.ceil(Decimal(str(rule.valid_fraction)) * len(utterances))


def test_named_speakers() -> None:
    assigned = assign_splits(
        _utterances([3, 4, 5]), HeldOut(test_speakers=("s1",), test_fraction=0.8, valid_fraction=0.1)
    )
    assert {u.speaker for u in assigned if u.split == "test"} == {"s1"}
    assert Counter(u.split for u in assigned) == {"train": 6, "valid": 2, "test": 4}


def test_exact_fractions_are_not_rounded_up() -> None:
    rule = HeldOut(test_fraction=0.1, valid_fraction=0.3, speaker_disjoint=False)
    assert Counter(u.split for u in assign_splits(_utterances([30]), rule)) == {
        "test": 3,
        "valid": 9,
        "train": 18,
    }


def test_seeds_differ() -> None:
    utterances = _utterances([1] * 40)
    choices = {tuple(_splits(assign_splits(utterances, HeldOut(test_fraction=0.2, seed=s))).values()) for s in range(5)}
    assert len(choices) == 5


def test_one_choice_is_pinned() -> None:
    """Runs of different versions must hold the same speakers out."""
    assigned = assign_splits(_utterances([2] * 10), HeldOut(test_fraction=0.2, valid_fraction=0.1))
    assert {u.speaker for u in assigned if u.split == "test"} == {"s0", "s4"}
    assert {u.id for u in assigned if u.split == "valid"} == {"u2-0", "u2-1"}


def test_everything_can_be_tested_on() -> None:
    assigned = assign_splits(_utterances([2, 3]), HeldOut(test_fraction=1.0, test_split="test-other"))
    assert {u.split for u in assigned} == {"test-other"}


def test_given_splits_stay() -> None:
    utterances = [dataclasses.replace(u, split=s) for u, s in zip(_utterances([2]), ["valid", "test-x"], strict=True)]
    assert assign_splits(utterances, HeldOut(test_fraction=0.5)) == utterances


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"test_fraction": 1.5}, "test_fraction is 1.5"),
        ({"valid_fraction": -0.1}, "valid_fraction is -0.1"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"test_fraction": 0.6, "valid_fraction": 0.6}, "more than 1 together"),
        ({"test_split": "held-out"}, "unknown split 'held-out'"),
        ({"test_split": "valid"}, "must start with 'test'"),
        ({"test_split": ""}, "must start with 'test'"),
    ],
)
def test_bad_rules(rule: dict[str, object], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        HeldOut(**rule)


def test_faults() -> None:
    with pytest.raises(SparqError, match="no utterance of test speaker 's11': did you mean 's1'"):
        assign_splits(_utterances([1, 1]), HeldOut(test_speakers=("s11",)))
    with pytest.raises(SparqError, match="5 utterances of 1 speakers are too few"):
        assign_splits(_utterances([5]), HeldOut(test_fraction=0.1))
    with pytest.raises(SparqError, match="too few"):
        assign_splits(_utterances([5, 5]), HeldOut(test_speakers=("s0", "s1")))
    nameless = [dataclasses.replace(u, speaker="") for u in _utterances([5])]
    with pytest.raises(SparqError, match="utterance 'u0-0' has no speaker"):
        assign_splits(nameless, HeldOut(test_fraction=0.1))
    assert {u.split for u in assign_splits(nameless, HeldOut())} == {"train"}
    mixed = [dataclasses.replace(nameless[0], split="train"), nameless[1]]
    with pytest.raises(SparqError, match="utterance 'u0-1' has no split, but 1 others"):
        assign_splits(mixed, HeldOut())
