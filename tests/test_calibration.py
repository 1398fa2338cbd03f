"""Calibration data of SpeechLMs: equal parts of the tasks, whole sequences of the split."""

from dataclasses import dataclass

import pytest
import torch

from sparq.errors import SparqError
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.tokens import fit_vocabulary, make_example
from sparq.tokens.special import units_to_text
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


SAID = [Said("red lamp" if i % 3 else "", tuple((i + j) % 6 for j in range(9 + i % 11))) for i in range(60)]


@pytest.mark.parametrize("tasks", [TASKS, ("asr",), ("textlm", "speechlm")])
@pytest.mark.parametrize("seed", [0, 7])
def test_parts_are_equal_by_tokens(tasks: tuple[str, ...], seed: int) -> None:
    found = task_examples(SAID, VOCABULARY, tasks=tasks, tokens=200, seed=seed)  # type: ignore[arg-type]
    assert set(found) == set(tasks)
    for task, examples in found.items():
        total = sum(map(len, examples))
        share = -(-200 // len(tasks))
        assert share <= total < share + max(map(len, examples))
        possible = [
            make_example(VOCABULARY, task, text=s.text, units=s.units) for s in SAID if s.text or task == "speechlm"
        ]
        left = list(possible)
        for example in examples:
            left.remove(example)  # none twice
    other = task_examples(SAID, VOCABULARY, tasks=tasks, tokens=200, seed=seed + 1)  # type: ignore[arg-type]
    assert other != found
    assert found == task_examples(SAID, VOCABULARY, tasks=tasks, tokens=200, seed=seed)  # type: ignore[arg-type]


def test_parts_are_equal_by_number() -> None:
    found = task_examples(SAID, VOCABULARY, count=22, seed=1)
    assert [len(examples) for examples in found.values()] == [6, 6, 5, 5]
    alone = task_examples(SAID, VOCABULARY, tasks=("tts",), count=5, seed=1)
    assert alone["tts"] == found["tts"]


def test_too_few_tokens() -> None:
    with pytest.raises(SparqError, match=r"the split has \d+ tokens of textlm, fewer than the 5000 asked for"):
        task_examples(SAID, VOCABULARY, tokens=20000, seed=0)
    whole = task_examples(SAID, VOCABULARY, tokens=20000, fewer=True, seed=0)
    assert [len(examples) for examples in whole.values()] == [40, 60, 40, 40]
    with pytest.raises(SparqError, match="the split has 0 tokens of asr"):
        task_examples([], VOCABULARY, tasks=("asr",), tokens=9, fewer=True, seed=0)


def test_batches_hold_each_sequence_behind_its_mask() -> None:
    examples = task_examples(SAID, VOCABULARY, count=60, seed=0)
    seen = []
    for batch in padded_batches(examples, VOCABULARY):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            assert torch.equal(mask, mask.sort(descending=True).values)
            seen.append((tuple(ids[mask.bool()].tolist()), tuple(ids[labels != -100].tolist())))
            assert torch.equal(labels[labels != -100], ids[labels != -100])
    every = [e for of_task in examples.values() for e in of_task]
    assert sorted(seen) == sorted(((*e.prompt, *e.target), tuple(e.target)) for e in every)


def test_the_first_batches_are_like_all() -> None:
    examples = task_examples(SAID * 9, VOCABULARY, count=1600, seed=0)
    lengths = [int(batch["attention_mask"].sum()) for batch in padded_batches(examples, VOCABULARY)]
    whole = sum(lengths) / len(lengths)
    assert sum(lengths[:30]) / 30 == pytest.approx(whole, rel=0.15)
