"""Batches as a pure function of seed and epoch, so that a resumed run sees exactly what an uninterrupted one sees."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from sparq.data.batch import Batch, collate, pack
from sparq.errors import SparqError
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.types import TASKS, Task


@runtime_checkable
class Spoken(Protocol):
    """An utterance as units and text; a text of "" makes it speech without transcript."""

    @property
    def text(self) -> str:
        """The normalized transcript."""

    @property
    def units(self) -> Sequence[int]:
        """Speech units."""

    @property
    def seconds(self) -> float:
        """How long the speech lasts."""


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
        example = make_example(vocabulary, task, text=utterance.text, units=utterance.units, prompt_units=heard)
        examples.append(example if task == "textlm" else dataclasses.replace(example, seconds=utterance.seconds))
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
        _check_fits(example, batch_tokens)
        longest = max(longest, len(example))
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = len(example)
        batches[-1].append(example)
    return [batches[i] for i in random.permutation(len(batches))]


def group_packed(
    examples: Sequence[Example], *, batch_tokens: int, long_length: int, random: np.random.Generator
) -> list[list[Example]]:
    """Group examples as they come, in random order, into rows bounded by tokens and by the cost of their attention.

    A row holds at most `batch_tokens` tokens, and the squares of its lengths add up to at most
    batch_tokens * long_length: rows of documents longer than `long_length` hold fewer tokens. One example alone is
    bounded by `batch_tokens` only.

    Raises:
        SparqError: one example alone is longer than `batch_tokens`.
    """
    groups: list[list[Example]] = []
    tokens = pairs = 0
    for example in (examples[i] for i in random.permutation(len(examples))):
        _check_fits(example, batch_tokens)
        tokens, pairs = tokens + len(example), pairs + len(example) ** 2
        if not groups or tokens > batch_tokens or pairs > batch_tokens * long_length:
            groups.append([])
            tokens, pairs = len(example), len(example) ** 2
        groups[-1].append(example)
    return groups


def _check_fits(example: Example, batch_tokens: int) -> None:
    if len(example) > batch_tokens:
        raise SparqError(
            f"a {example.task} sequence of {len(example)} tokens does not fit batch_tokens = {batch_tokens}:"
            f" set it to {len(example)} or more, or shorten the audio"
        )


def training_batches(
    utterances: Sequence[Spoken],
    vocabulary: JointVocabulary,
    *,
    weights: Mapping[Task, float],
    batch_tokens: int,
    seed: int,
    pad_id: int,
    long_length: int | None = None,
    unit_noise: float = 0.0,
    shares: Float[np.ndarray, "utterances"] | None = None,
    skip: int = 0,
) -> Iterator[Batch]:
    """Yield batches without end, epoch after epoch, leaving out the first `skip` of the whole stream.

    Args:
        utterances: the training split.
        vocabulary: the joint vocabulary.
        weights: how often each task is drawn.
        batch_tokens: tokens of a batch at most, padding counted.
        seed: of the run.
        pad_id: token of the padding.
        long_length: pack, see `group_packed`; None pads batches of sequences of like length.
        unit_noise: rate of `corrupt_units` in ASR prompts.
        shares: how often each utterance is shown in an epoch, see `draw_epoch`; once if None.
        skip: batches to leave out.
    """
    assert utterances, "an empty training split has no batches"
    assert shares is None or shares.any(), "an epoch without an utterance would never end"
    for epoch in itertools.count():
        groups = epoch_groups(
            utterances, vocabulary, weights=weights, batch_tokens=batch_tokens, seed=seed, epoch=epoch,
            long_length=long_length, unit_noise=unit_noise, shares=shares,
        )  # fmt: skip
        for group in groups[skip:]:
            yield collate(group, pad_id=pad_id) if long_length is None else pack(group)
        skip = max(0, skip - len(groups))


def epoch_groups(
    utterances: Sequence[Spoken],
    vocabulary: JointVocabulary,
    *,
    weights: Mapping[Task, float],
    batch_tokens: int,
    seed: int,
    epoch: int,
    long_length: int | None = None,
    unit_noise: float = 0.0,
    shares: Float[np.ndarray, "utterances"] | None = None,
) -> list[list[Example]]:
    """Return the examples of one epoch, grouped into batches; the arguments are those of `training_batches`."""
    shown = utterances
    if shares is not None:
        shown = [utterances[i] for i in draw_epoch(shares, random=np.random.default_rng([seed, epoch, 2]))]
    examples = epoch_examples(shown, vocabulary, weights=weights, seed=seed, epoch=epoch, unit_noise=unit_noise)
    random = np.random.default_rng([seed, epoch, 1])
    if long_length is None:
        return group_by_length(examples, batch_tokens=batch_tokens, random=random)
    return group_packed(examples, batch_tokens=batch_tokens, long_length=long_length, random=random)
