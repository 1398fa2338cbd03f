"""Scores against slow references and closed forms."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import PreTrainedModel

from sparq.evaluation import (
    Transcribed,
    generate_targets,
    prose_perplexity,
    task_perplexity,
    unit_errors,
    word_errors,
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
def test_word_errors_are_summed_over_the_corpus(pairs: list[tuple[list[str], list[str]]]) -> None:
    transcripts = [
        Transcribed(id=str(i), split="test", reference=" ".join(r), hypothesis=" ".join(h))
        for i, (r, h) in enumerate(pairs)
    ]
    counted = word_errors(transcripts)
    assert counted.errors == sum(edits(r, h) for r, h in pairs)
    assert counted.words == sum(len(r) for r, _ in pairs)
    assert counted.rate == pytest.approx(100 * counted.errors / counted.words)


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
