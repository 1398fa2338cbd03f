"""The shapes of a training's micro-batches, without or with the data that it will see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparq.data import Batch, collate, pack
from sparq.data.batching import epoch_groups
from sparq.recipes.jobs import plan
from sparq.recipes.pipeline import STEPS
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.text_alone import text_alone
from sparq.recipes.train_step import load_split, load_vocabulary, stream_options, validation_batches
from sparq.tokens import Example
from sparq.tokens.special import PAD

ASSUMED_LENGTH = 128
"""Tokens of a sequence where no vocabulary says: LibriSpeech's four tasks with 5,000 pieces have 108 on average."""

_SAMPLE = 4000
"""Utterances at most that stand for a training split; of text alone, as large a part stands for an epoch's."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The micro-batches of a training.

    Attributes:
        pieces: size of the vocabulary.
        batches: the first ones of a training, or of a part of its utterances.
        largest: the one that takes most memory.
        epoch_tokens: tokens of an epoch; None where they are not known.
        validation_tokens: tokens of a validation, likewise.
        source: where that is from, in words.
    """

    pieces: int
    batches: tuple[Batch, ...]
    largest: Batch
    epoch_tokens: float | None
    validation_tokens: int | None
    source: str

    @property
    def batch_tokens(self) -> float:
        """Tokens of a micro-batch on average."""
        return sum(batch.num_tokens for batch in self.batches) / len(self.batches)


def training_shapes(recipe: Recipe, run: RunFolder | None) -> Shapes:
    """Return the shapes of a run's data, or assumed ones if there is none yet."""
    if run is None:
        return _assumed(recipe, "assumed, because no --out names a run with a vocabulary")
    job = next(job for job in plan(recipe, STEPS) if job.name == "vocab")
    if not run.is_done(job.name, job.key):
        why = "assumed, because the run has no vocabulary of this recipe: `sparq run --until vocab` makes it"
        return _assumed(recipe, why)
    vocabulary = load_vocabulary(run)
    utterances = load_split(run, "train", vocabulary)
    random = np.random.default_rng(recipe.seed)
    chosen = random.permutation(len(utterances))[:_SAMPLE]
    with text_alone(recipe, run, vocabulary) as texts:
        lines = [] if texts is None else texts(0)
    some = random.permutation(len(lines))[: round(len(lines) * len(chosen) / len(utterances))]
    options = stream_options(recipe, utterances, lambda _: [lines[i] for i in some])
    options["shares"] = options["shares"][chosen]
    groups = epoch_groups([utterances[i] for i in chosen], vocabulary, epoch=0, **options)
    pad = vocabulary.token_id(PAD)
    validation = validation_batches(
        load_split(run, "valid", vocabulary), vocabulary, batch_tokens=recipe.train.batch_tokens, seed=recipe.seed
    )
    batches = [_batch(recipe, group, pad) for group in groups]
    return _shaped(
        batches,
        pieces=len(vocabulary),
        epoch_tokens=sum(batch.num_tokens for batch in batches) * len(utterances) / len(chosen),
        validation_tokens=sum(batch.num_tokens for own in validation.values() for batch in own),
        source=f"lengths are those of {len(chosen):,} of {len(utterances):,} utterances"
        + (f" and {len(some):,} of {len(lines):,} lines of text" if lines else ""),
    )


def _assumed(recipe: Recipe, why: str) -> Shapes:
    """Return full micro-batches of sequences of one length."""
    length = min(ASSUMED_LENGTH, recipe.train.batch_tokens)
    random = np.random.default_rng(recipe.seed)
    ids = random.integers(recipe.vocab.size, size=(recipe.train.batch_tokens // length, length)).tolist()
    # The loss counts on about half of a sequence: a prompt of the one kind, a target of the other.
    examples = [Example(task="asr", prompt=tuple(row[: length // 2]), target=tuple(row[length // 2 :])) for row in ids]
    return _shaped(
        [_batch(recipe, examples, 0)],
        pieces=recipe.vocab.size,
        epoch_tokens=None,
        validation_tokens=None,
        source=f"lengths of {length} tokens are {why}",
    )


def _shaped(batches: list[Batch], **others: object) -> Shapes:
    largest = max(batches, key=lambda batch: (batch.input_ids.numel(), sum(n * n for n in batch.lengths)))
    return Shapes(batches=tuple(batches), largest=largest, **others)  # type: ignore[arg-type]


def _batch(recipe: Recipe, group: Sequence[Example], pad: int) -> Batch:
    return pack(group) if recipe.train.packing else collate(group, pad_id=pad)
