"""Batches as a pure function of seed and epoch, so that a resumed run sees exactly what an uninterrupted one sees."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparq.errors import SparqError
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.types import TASKS, Task

IGNORE = -100
"""The label of a position without loss."""


@runtime_checkable
class Spoken(Protocol):
    """An utterance as units and text; a text of "" makes it speech without transcript."""

    @property
    def text(self) -> str:
        """The normalized transcript."""

    @property
    def units(self) -> Sequence[int]:
        """Speech units."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded sequences; padding is on the right, where a causal model needs no mask for it."""

    input_ids: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    num_targets: int


def corrupt_units(units: Sequence[int], *, rate: float, num_units: int, random: np.random.Generator) -> list[int]:
    """Drop or replace units at random, each with probability rate / 2 (what noise between speakers does to units).

    Args:
        units: de-duplicated units.
        rate: expected share of changed units.
        num_units: size of the alphabet.
        random: the source of chance.
    """
    if rate == 0:
        return list(units)
    chance = random.random(len(units))
    replacements = random.integers(num_units, size=len(units))
    return [
        int(replacements[i]) if rate / 2 <= chance[i] < rate else unit
        for i, unit in enumerate(units)
        if chance[i] >= rate / 2
    ]


def epoch_examples(
    utterances: Sequence[Spoken],
    vocabulary: JointVocabulary,
    *,
    weights: Mapping[Task, float],
    seed: int,
    epoch: int,
    unit_noise: float = 0.0,
) -> list[Example]:
    """Show every utterance once, as a task drawn by weight; speech without transcript is always speechlm.

    Args:
        utterances: the training split.
        vocabulary: the joint vocabulary.
        weights: how often each task is drawn; only the proportions matter.
        seed: of the run.
        epoch: from 0.
        unit_noise: rate of `corrupt_units` in ASR prompts.
    """
    random = np.random.default_rng([seed, epoch])
    proportions = np.array([weights[task] for task in TASKS], dtype=float)
    draws = random.choice(len(TASKS), size=len(utterances), p=proportions / proportions.sum())
    examples = []
    for utterance, draw in zip(utterances, draws, strict=True):
        task = TASKS[int(draw)] if utterance.text else "speechlm"
        heard = None
        if task == "asr":
            heard = corrupt_units(utterance.units, rate=unit_noise, num_units=vocabulary.num_units, random=random)
        examples.append(make_example(vocabulary, task, text=utterance.text, units=utterance.units, prompt_units=heard))
    return examples


def draw_epoch(shares: Float[np.ndarray, "utterances"], *, random: np.random.Generator) -> list[int]:
    """Return the utterances of an epoch by number: a share of 2.3 is shown twice, and with probability .3 once more."""
    whole = np.floor(shares)
    times = whole + (random.random(len(shares)) < shares - whole)
    return np.repeat(np.arange(len(shares)), times.astype(int)).tolist()


def group_by_length(
    examples: Sequence[Example], *, batch_tokens: int, random: np.random.Generator
) -> list[list[Example]]:
    """Group examples of like length into batches of at most `batch_tokens` padded tokens, in random order.

    Raises:
        SparqError: one example alone is longer than `batch_tokens`.
    """
    order = np.argsort([len(e) + 4 * random.random() for e in examples], kind="stable")
    batches: list[list[Example]] = []
    longest = 0
    for example in (examples[i] for i in order):
        if len(example) > batch_tokens:
            raise SparqError(
                f"a {example.task} sequence of {len(example)} tokens does not fit batch_tokens = {batch_tokens}:"
                f" set it to {len(example)} or more, or shorten the audio"
            )
        longest = max(longest, len(example))
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = len(example)
        batches[-1].append(example)
    return [batches[i] for i in random.permutation(len(batches))]


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad examples on the right; labels are the input ids where the loss counts, else `IGNORE`."""
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORE)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        input_ids[row, :end] = torch.tensor((*example.prompt, *example.target))
        labels[row, start:end] = torch.tensor(example.target)
    return Batch(input_ids=input_ids, labels=labels, num_targets=sum(len(e.target) for e in examples))


def training_batches(
    utterances: Sequence[Spoken],
    vocabulary: JointVocabulary,
    *,
    weights: Mapping[Task, float],
    batch_tokens: int,
    seed: int,
    pad_id: int,
    unit_noise: float = 0.0,
    shares: Float[np.ndarray, "utterances"] | None = None,
    skip: int = 0,
) -> Iterator[Batch]:
    """Yield batches without end, epoch after epoch, leaving out the first `skip` of the whole stream.

    Args:
        utterances: the training split.
        vocabulary: the joint vocabulary.
        weights: how often each task is drawn.
        batch_tokens: padded tokens of a batch at most.
        seed: of the run.
        pad_id: token of the padding.
        unit_noise: rate of `corrupt_units` in ASR prompts.
        shares: how often each utterance is shown in an epoch, see `draw_epoch`; once if None.
        skip: batches to leave out.
    """
    assert utterances, "an empty training split has no batches"
    assert shares is None or shares.any(), "an epoch without an utterance would never end"
    epoch = 0
    while True:
        shown = utterances
        if shares is not None:
            shown = [utterances[i] for i in draw_epoch(shares, random=np.random.default_rng([seed, epoch, 2]))]
        examples = epoch_examples(shown, vocabulary, weights=weights, seed=seed, epoch=epoch, unit_noise=unit_noise)
        random = np.random.default_rng([seed, epoch, 1])
        for group in group_by_length(examples, batch_tokens=batch_tokens, random=random):
            if skip > 0:
                skip -= 1
            else:
                yield collate(group, pad_id=pad_id)
        epoch += 1
