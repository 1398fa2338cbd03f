"""Batches as a pure function of seed and epoch, so that a resumed run sees exactly what an uninterrupted one sees."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from sparq.data.batch import Batch, collate, pack
from sparq.errors import SparqError
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.types import TASKS, Task

EpochExamples = Callable[[int], Sequence[Example]]
"""Gives examples that an epoch has besides those of the utterances, the same whenever it is asked; epochs from 0."""


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
    temperature: float | None = None,
) -> list[Example]:
    """Return as many examples as there are utterances, each of a task.

    Without a temperature every utterance is shown once, as a task drawn by weight; speech without transcript is always
    speechlm. With one, the tasks are mixed as `task_mixture` says and each draws its own utterances.

    Args:
        utterances: the training split.
        vocabulary: the joint vocabulary.
        weights: how often each task is drawn; only the proportions matter.
        seed: of the run.
        epoch: from 0.
        unit_noise: rate of `corrupt_units` in ASR prompts.
        temperature: of the mixture.
    """
    random = np.random.default_rng([seed, epoch])
    if temperature is None:
        proportions = np.array([weights[task] for task in TASKS], dtype=float)
        draws = random.choice(len(TASKS), size=len(utterances), p=proportions / proportions.sum())
        shown = [(u, TASKS[int(draw)] if u.text else "speechlm") for u, draw in zip(utterances, draws, strict=True)]
    else:
        shown = mixed_by_temperature(utterances, weights=weights, temperature=temperature, random=random)
    examples = []
    for utterance, task in shown:
        heard = None
        if task == "asr":
            heard = corrupt_units(utterance.units, rate=unit_noise, num_units=vocabulary.num_units, random=random)
        example = make_example(vocabulary, task, text=utterance.text, units=utterance.units, prompt_units=heard)
        examples.append(example if task == "textlm" else dataclasses.replace(example, seconds=utterance.seconds))
    return examples


def task_mixture(
    sizes: Mapping[Task, int], weights: Mapping[Task, float], temperature: float
) -> Float[np.ndarray, " tasks"]:
    """Return the probability of each task, in the order of `TASKS`.

        p_i = w_i n_i^(1 / T) / sum over tasks

    With T = 1 a task is as frequent as its data; the larger T, the more the weights alone decide, as in multilingual
    models (Arivazhagan et al. 2019, arXiv 1907.05019, section 4.2, where all weights are 1).

    Args:
        sizes: n, utterances that can be the task.
        weights: w.
        temperature: T, above 0.
    """
    powers = np.array([weights[task] * sizes[task] ** (1 / temperature) for task in TASKS])
    mixture: Float[np.ndarray, " tasks"] = powers / powers.sum()
    return mixture


def mixed_by_temperature(
    utterances: Sequence[Spoken], *, weights: Mapping[Task, float], temperature: float, random: np.random.Generator
) -> list[tuple[Spoken, Task]]:
    """Return as many pairs as there are utterances, their tasks drawn from `task_mixture`.

    A task takes its utterances in random order, and each of them again only when all have been taken.
    """
    spoken = np.arange(len(utterances))
    transcribed = np.array([i for i, u in enumerate(utterances) if u.text], dtype=int)
    pools = {task: spoken if task == "speechlm" else transcribed for task in TASKS}
    sizes = {task: len(pool) for task, pool in pools.items()}
    counts = random.multinomial(len(utterances), task_mixture(sizes, weights, temperature))
    pairs: list[tuple[Spoken, Task]] = []
    for task, count in zip(TASKS, counts.tolist(), strict=True):
        rounds = -(-count // sizes[task]) if count else 0
        order = [i for _ in range(rounds) for i in random.permutation(pools[task]).tolist()]
        pairs += [(utterances[i], task) for i in order[:count]]
    return pairs


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
        check_fits(example, batch_tokens)
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
        check_fits(example, batch_tokens)
        tokens, pairs = tokens + len(example), pairs + len(example) ** 2
        if not groups or tokens > batch_tokens or pairs > batch_tokens * long_length:
            groups.append([])
            tokens, pairs = len(example), len(example) ** 2
        groups[-1].append(example)
    return groups


def check_fits(example: Example, batch_tokens: int) -> None:
    """Check that an example is not longer than a batch may be.

    Raises:
        SparqError: it is.
    """
    if len(example) > batch_tokens:
        raise SparqError(
            f"a {example.task} sequence of {len(example)} tokens does not fit batch_tokens = {batch_tokens}:"
            f" set it to {len(example)} or more, or shorten the {'text' if example.task == 'textlm' else 'audio'}"
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
    temperature: float | None = None,
    extra: EpochExamples | None = None,
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
        temperature: of the mixture of tasks, see `epoch_examples`.
        extra: more examples of each epoch.
        skip: batches to leave out.
    """
    assert utterances, "an empty training split has no batches"
    assert shares is None or shares.any(), "an epoch without an utterance would never end"
    for epoch in itertools.count():
        groups = epoch_groups(
            utterances, vocabulary, weights=weights, batch_tokens=batch_tokens, seed=seed, epoch=epoch,
            long_length=long_length, unit_noise=unit_noise, shares=shares, temperature=temperature, extra=extra,
        )  # fmt: skip
        for number, group in enumerate(groups[skip:], start=skip + 1):
            batch = collate(group, pad_id=pad_id) if long_length is None else pack(group)
            yield dataclasses.replace(batch, epochs=epoch + number / len(groups))
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
    temperature: float | None = None,
    extra: EpochExamples | None = None,
) -> list[list[Example]]:
    """Return the examples of one epoch, grouped into batches; the arguments are those of `training_batches`."""
    shown = utterances
    if shares is not None:
        shown = [utterances[i] for i in draw_epoch(shares, random=np.random.default_rng([seed, epoch, 2]))]
    examples = epoch_examples(
        shown, vocabulary, weights=weights, seed=seed, epoch=epoch, unit_noise=unit_noise, temperature=temperature
    )
    if extra is not None:
        examples += extra(epoch)
    random = np.random.default_rng([seed, epoch, 1])
    if long_length is None:
        return group_by_length(examples, batch_tokens=batch_tokens, random=random)
    return group_packed(examples, batch_tokens=batch_tokens, long_length=long_length, random=random)
