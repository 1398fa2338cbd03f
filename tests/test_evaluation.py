"""Scores against slow references and closed forms."""

import itertools
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.evaluation import (
    bootstrap_interval,
    generate_targets,
    prose_perplexity,
    read_records,
    score_transcript,
    sum_errors,
    task_perplexity,
    unit_errors,
    write_records,
)
from sparq.tokens import Example, fit_vocabulary
from sparq.tokens.special import END, units_to_text
from sparq.tokens.vocabulary import as_line


def edits(a: list[str], b: list[str]) -> int:
    """Levenshtein distance by the recurrence, nothing clever."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


WORDS = st.lists(st.sampled_from(["red", "lamp", "door"]), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(WORDS, st.lists(st.sampled_from(["red", "lamp", "door"]), max_size=6)), min_size=1, max_size=4)
)
def test_errors_are_summed_over_the_corpus(pairs: list[tuple[list[str], list[str]]]) -> None:
    transcripts = [
        score_transcript(id=str(i), split="test", task="asr", reference=" ".join(r), hypothesis=" ".join(h))
        for i, (r, h) in enumerate(pairs)
    ]
    counted = sum_errors(transcripts, "words")
    assert counted.errors == sum(edits(r, h) for r, h in pairs)
    assert counted.length == sum(len(r) for r, _ in pairs)
    assert counted.rate == pytest.approx(100 * counted.errors / counted.length)
    assert counted.low <= counted.high
    letters = sum_errors(transcripts, "characters")
    assert letters.errors == sum(edits(list(" ".join(r)), list(" ".join(h))) for r, h in pairs)
    assert letters.length == sum(len(" ".join(r)) for r, _ in pairs)


def test_the_bootstrap_of_equal_utterances_has_no_width() -> None:
    assert bootstrap_interval(np.array([1, 2, 3]), np.array([4, 8, 12])) == pytest.approx((25, 25))


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    """Three utterances have 27 resamples; the interval is that of their exact distribution."""
    errors, lengths = np.array([0, 3, 9]), np.array([10, 8, 12])
    rates = sorted(
        100 * errors[list(drawn)].sum() / lengths[list(drawn)].sum() for drawn in itertools.product(range(3), repeat=3)
    )
    # A quarter of 27 resamples is 6.75, so the quartiles are steps of the distribution.
    low, high = bootstrap_interval(errors, lengths, num_resamples=20_000, level=0.5)
    assert (low, high) == pytest.approx((rates[6], rates[20]))
    assert bootstrap_interval(errors, lengths, seed=3) == bootstrap_interval(errors, lengths, seed=3)


def test_the_bootstrap_covers_the_true_rate() -> None:
    """Of 300 samples of 60 utterances with a true rate of 20 %, about 95 % have it in their interval."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        lengths = random.integers(3, 12, size=60)
        low, high = bootstrap_interval(random.binomial(lengths, 0.2), lengths, num_resamples=200, seed=seed)
        covered += low <= 20 <= high
    assert 0.9 < covered / 300 < 0.99


def test_records_survive_parquet(tmp_path: Path) -> None:
    records = [
        score_transcript(id=f"u{i}", split="test", task=task, reference="the red lamp", hypothesis=heard)
        for i, (task, heard) in enumerate((("asr", "the lamp"), ("tts", ""), ("tts", "\u0101 red lamp")))
    ]
    write_records(tmp_path / "r.parquet", records)
    assert read_records(tmp_path / "r.parquet") == records
    assert [(r.word_errors, r.words) for r in records] == [(1, 3), (3, 3), (1, 3)]
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:-20])
    with pytest.raises(SparqError, match="broken.parquet is not a file of transcripts"):
        read_records(tmp_path / "broken.parquet")


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), max_size=9)),
        min_size=1,
        max_size=3,
    )
)
def test_unit_errors(pairs: list[tuple[list[int], list[int]]]) -> None:
    counted = unit_errors([r for r, _ in pairs], [h for _, h in pairs])
    assert counted.errors == sum(edits(list(map(str, r)), list(map(str, h))) for r, h in pairs)
    assert counted.units == sum(len(r) for r, _ in pairs)


def slow_nll(model: PreTrainedModel, prompt: tuple[int, ...], target: tuple[int, ...]) -> float:
    """One sequence, one target token at a time, each from a fresh pass."""
    total = 0.0
    for i, token in enumerate(target):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *target[:i]]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, dim=-1)[token])
    return total


def test_task_perplexity_counts_targets_only(tiny_llama: PreTrainedModel) -> None:
    examples = [
        Example(task="asr", prompt=(3, 5, 9, 4), target=(7, 8, 2)),
        Example(task="asr", prompt=(3,), target=(11, 2)),
        Example(task="asr", prompt=(3, 6, 6, 6, 6, 6, 4), target=(2,)),
    ]
    expected = sum(slow_nll(tiny_llama, e.prompt, e.target) for e in examples)
    measured = task_perplexity(tiny_llama, examples, batch_size=2)
    assert measured.num_tokens == 6
    assert math.log(measured.value) * 6 == pytest.approx(expected, rel=1e-5)


def test_prose_perplexity_counts_all_but_the_first_token_of_a_window(tiny_llama: PreTrainedModel) -> None:
    ids = torch.randint(3, 96, (21,))
    windows = [tuple(ids[s : s + 8].tolist()) for s in (0, 8, 16)]
    expected = sum(slow_nll(tiny_llama, w[:1], w[1:]) for w in windows)
    measured = prose_perplexity(tiny_llama, ids, context=8)
    assert measured.num_tokens == 7 + 7 + 4
    assert math.log(measured.value) * 18 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_keeps_the_order_and_cuts_at_the_end_token(tiny_llama: PreTrainedModel, num_beams: int) -> None:
    vocabulary = fit_vocabulary(
        [as_line("red lamp"), units_to_text([0, 1, 2])] * 3,
        size=20,
        num_units=3,
        units_fingerprint="u",
        model_type="bpe",
    )
    prompts = [[3, 5], [4, 9, 10, 11, 12], [6], [3, 9, 9]]
    done: list[int] = []
    together = generate_targets(
        tiny_llama, vocabulary, prompts, max_new_tokens=6, num_beams=num_beams, batch_size=2, on_done=done.append
    )
    alone = [generate_targets(tiny_llama, vocabulary, [p], max_new_tokens=6, num_beams=num_beams)[0] for p in prompts]
    assert together == alone
    assert done == [2, 2]
    assert all(vocabulary.token_id(END) not in ids for ids in together)
