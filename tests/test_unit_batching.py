"""Cuts and batches of clips of unlike lengths."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sparq.units.batching import cut_evenly, length_sorted


@given(frames=st.integers(0, 5000), longest=st.integers(1, 700))
def test_even_cuts_lose_nothing(frames: int, longest: int) -> None:
    cuts = cut_evenly(frames, longest)
    assert [f for start, stop in cuts for f in range(start, stop)] == list(range(frames))
    lengths = [stop - start for start, stop in cuts]
    assert len(cuts) == -(-frames // longest)
    assert all(1 <= n <= longest for n in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1


@given(lengths=st.lists(st.integers(1, 900), max_size=40), budget=st.integers(0, 3000))
def test_batches_are_sorted_and_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(length_sorted(lengths, budget))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    for batch, following in pairwise(batches):  # no batch could have taken one more clip
        assert (len(batch) + 1) * lengths[following[0]] > budget
