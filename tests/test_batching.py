"""Batches: nothing lost, loss only where the templates say, and the same stream after a resume."""

import itertools
from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparq.data import IGNORE, collate, group_by_length, pack, training_batches
from sparq.data.batching import EpochExamples, corrupt_units, draw_epoch, epoch_examples, epoch_groups
from sparq.errors import SparqError
from sparq.tokens import Example, fit_vocabulary, make_example
from sparq.tokens.special import START_OF_SPEECH, units_to_text
from sparq.tokens.vocabulary import as_line
from sparq.types import TASKS

VOCABULARY = fit_vocabulary(
    [as_line("red lamp"), as_line("green door"), units_to_text([0, 1, 2, 3, 4, 5])] * 3,
    size=36, num_units=6, units_fingerprint="u", model_type="bpe",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    text: str
    units: tuple[int, ...]
    seconds: float = 0.5


SAID = [Said("red lamp" if i % 3 else "", tuple((i + j) % 6 for j in range(3 + i % 11))) for i in range(40)]


@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=60))
def test_groups_hold_every_example_once_within_the_bound(lengths: list[tuple[int, int]]) -> None:
    examples = [Example(task="asr", prompt=(1,) * p, target=(2,) * t) for p, t in lengths]
    groups = group_by_length(examples, batch_tokens=40, random=np.random.default_rng(0))
    assert sorted(map(id, itertools.chain(*groups))) == sorted(map(id, examples))
    assert all(max(map(len, g)) * len(g) <= 40 for g in groups)


def test_an_example_over_the_bound_is_named() -> None:
    with pytest.raises(SparqError, match="a tts sequence of 9 tokens does not fit batch_tokens = 8: set it to 9"):
        group_by_length(
            [Example(task="tts", prompt=(1,) * 4, target=(1,) * 5)], batch_tokens=8, random=np.random.default_rng(0)
        )


def test_labels_count_after_the_generate_token_only() -> None:
    batch = collate(
        [Example(task="asr", prompt=(3, 9), target=(5, 2)), Example(task="asr", prompt=(3,), target=(2,))], pad_id=0
    )
    assert batch.input_ids.tolist() == [[3, 9, 5, 2], [3, 2, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 5, 2], [IGNORE, 2, IGNORE, IGNORE]]
    assert batch.num_targets == 3


def text_alone(epoch: int) -> list[Example]:
    """Seven examples that are of no utterance, others in each epoch."""
    texts = [" ".join(["green"] * (1 + epoch + number)) for number in range(7)]
    return [make_example(VOCABULARY, "textlm", text=text, units=()) for text in texts]


@settings(max_examples=20)
@given(skip=st.integers(0, 40), temperature=st.sampled_from([None, 2.0]), extra=st.sampled_from([None, text_alone]))
def test_a_resumed_stream_continues_the_same(skip: int, temperature: float | None, extra: EpochExamples | None) -> None:
    options = {"weights": dict.fromkeys(TASKS, 1.0), "batch_tokens": 60, "seed": 3, "pad_id": 0, "unit_noise": 0.2}
    options |= {"temperature": temperature, "extra": extra}
    whole = list(itertools.islice(training_batches(SAID, VOCABULARY, **options), skip + 3))
    resumed = list(itertools.islice(training_batches(SAID, VOCABULARY, skip=skip, **options), 3))
    for a, b in zip(whole[skip:], resumed, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("long_length", [None, 30])
def test_more_examples_change_no_others(long_length: int | None) -> None:
    options = {"weights": dict.fromkeys(TASKS, 1.0), "batch_tokens": 60, "seed": 3, "unit_noise": 0.2}
    options["long_length"] = long_length
    for epoch in range(4):
        alone, joined = (
            Counter(itertools.chain(*epoch_groups(SAID, VOCABULARY, epoch=epoch, **options, **more)))
            for more in ({}, {"extra": text_alone})
        )
        assert joined - alone == Counter(text_alone(epoch))
        assert alone - joined == Counter()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_tasks_are_mixed_by_temperature(temperature: float) -> None:
    """p_i in proportion to w_i n_i^(1/T): 40 utterances, 26 of them with text."""
    weights = {"asr": 3.0, "tts": 1.0, "speechlm": 1.0, "textlm": 0.0}
    shown: dict[str, list[Counter[tuple[int, ...]]]] = {task: [] for task in TASKS}
    for epoch in range(60):
        examples = epoch_examples(SAID, VOCABULARY, weights=weights, seed=0, epoch=epoch, temperature=temperature)
        assert len(examples) == len(SAID)
        for task in TASKS:
            shown[task].append(Counter(e.prompt + e.target for e in examples if e.task == task))
    sizes = {"asr": 26, "tts": 26, "speechlm": 40, "textlm": 26}
    powers = {task: weights[task] * sizes[task] ** (1 / temperature) for task in TASKS}
    for task in TASKS:
        share = sum(sum(counts.values()) for counts in shown[task]) / (60 * len(SAID))
        expected = powers[task] / sum(powers.values())
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / (60 * len(SAID))) ** 0.5
    # No utterance a second time before all of the task's had their turn; 13 sequences are alike in this corpus.
    distinct = Counter(e.prompt + e.target for e in all_as("asr"))
    for counts in shown["asr"]:
        rounds = -(-sum(counts.values()) // 26)
        assert all(count <= rounds * distinct[ids] for ids, count in counts.items())


def all_as(task: str) -> list[Example]:
    weights = {other: float(other == task) for other in TASKS}
    return [e for e in epoch_examples(SAID, VOCABULARY, weights=weights, seed=0, epoch=0) if e.task == task]


def test_a_mixture_of_tasks_without_data() -> None:
    speech = [said for said in SAID if not said.text]
    examples = epoch_examples(speech, VOCABULARY, weights=dict.fromkeys(TASKS, 1.0), seed=0, epoch=0, temperature=2.0)
    assert {e.task for e in examples} == {"speechlm"}


def test_a_stream_counts_its_epochs() -> None:
    options = {"weights": dict.fromkeys(TASKS, 1.0), "batch_tokens": 60, "seed": 3, "pad_id": 0}
    counted: list[float] = []
    shown = 0
    for batch in itertools.islice(training_batches(SAID, VOCABULARY, **options), 60):
        shown += len(batch.lengths)
        assert batch.epochs is not None
        counted.append(batch.epochs)
        # Whole epochs end with the last of their utterances.
        assert (batch.epochs % 1 == 0) == (shown % len(SAID) == 0)
        assert int(batch.epochs) == shown // len(SAID)
    assert counted == sorted(counted)
    assert counted[-1] > 2
    (resumed,) = itertools.islice(training_batches(SAID, VOCABULARY, skip=59, **options), 1)
    assert resumed.epochs == counted[-1]


def test_speech_is_timed_but_in_text_alone() -> None:
    for task in TASKS:
        assert all(e.seconds == (0.0 if task == "textlm" else 0.5) for e in all_as(task))
    batch = collate(all_as("asr")[:4], pad_id=0)
    assert batch.seconds == pack(all_as("asr")[:4]).seconds == 2.0


def test_tasks_follow_their_weights_and_speech_without_text_is_speechlm() -> None:
    weights = {"asr": 3.0, "tts": 1.0, "speechlm": 0.0, "textlm": 0.0}
    examples = [
        e for epoch in range(50) for e in epoch_examples(SAID, VOCABULARY, weights=weights, seed=0, epoch=epoch)
    ]
    with_text = sum(bool(s.text) for s in SAID) * 50
    tasks = [e.task for e in examples]
    assert tasks.count("speechlm") == len(examples) - with_text
    assert tasks.count("asr") / with_text == pytest.approx(0.75, abs=0.03)
    assert tasks.count("textlm") == 0


@given(rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_corrupted_units_stay_in_the_alphabet(rate: float, seed: int) -> None:
    units = [i % 6 for i in range(50)]
    out = corrupt_units(units, rate=rate, num_units=6, random=np.random.default_rng(seed))
    assert len(out) <= 50
    assert set(out) <= set(range(6))
    assert rate > 0 or out == units


@given(shares=st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.5]), min_size=1, max_size=20))
def test_an_epoch_shows_an_utterance_as_often_as_its_share(shares: list[float]) -> None:
    random = np.random.default_rng(0)
    epochs = [np.bincount(draw_epoch(np.array(shares), random=random), minlength=len(shares)) for _ in range(400)]
    for times, share in zip(np.transpose(epochs), shares, strict=True):
        assert set(times) <= {int(np.floor(share)), int(np.ceil(share))}
        assert abs(times.mean() - share) < 0.11  # over four standard deviations of the mean


def test_shares_of_one_change_nothing_and_of_zero_leave_out() -> None:
    options = {"weights": dict.fromkeys(TASKS, 1.0), "batch_tokens": 60, "seed": 3, "pad_id": 0}

    def first(**more: object) -> list[list[int]]:
        stream = training_batches(SAID, VOCABULARY, **options, **more)  # type: ignore[arg-type]
        return [row for batch in itertools.islice(stream, 30) for row in batch.input_ids.tolist()]

    assert first() == first(shares=np.ones(len(SAID)))
    # What has no text is speechlm; without it and with ASR alone every sequence starts as a heard one.
    options["weights"] = {task: float(task == "asr") for task in TASKS}
    heard = VOCABULARY.token_id(START_OF_SPEECH)
    assert {row[0] == heard for row in first()} == {True, False}
    with_text = np.array([float(bool(said.text)) for said in SAID])
    assert {row[0] == heard for row in first(shares=with_text)} == {True}
