"""Text alone in training: the lines of `train.extra_text` as examples of TextLM, besides the transcripts."""

import contextlib
import logging
from collections.abc import Iterator

from sparq.data.batching import EpochExamples, check_fits
from sparq.data.text_epochs import TextLines
from sparq.errors import SparqError
from sparq.files import temporary_database
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.train_together import is_follower
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.tokens.special import UNKNOWN
from sparq.units import read_summary, read_units

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def text_alone(recipe: Recipe, run: RunFolder, vocabulary: JointVocabulary) -> Iterator[EpochExamples | None]:
    """Yield what gives each epoch its examples of text alone; None if the recipe names no text.

    Lines that the run holds out as transcripts, for validation or test, are left out and counted.

    Args:
        recipe: what to do.
        run: a run with units.
        vocabulary: the joint vocabulary.

    Raises:
        SparqError: a file is missing or damaged, or has a line in another script, one that does not fit a micro-batch,
            or none to train on.
    """
    train = recipe.train
    if not train.extra_text:
        yield None
        return

    def example(text: str) -> Example:
        return make_example(vocabulary, "textlm", text=text, units=())

    with temporary_database() as database:
        lines = TextLines(
            database, train.extra_text, most=train.extra_lines, seed=recipe.training_seed,
            held_out=held_out_texts(run, vocabulary),
        )  # fmt: skip
        # A piece has a character at least; the three others are the task, the space ahead and the end.
        for file, text in lines.longer_than(train.batch_tokens - 3):
            try:
                check_fits(example(text), train.batch_tokens)
            except SparqError as error:
                raise SparqError(f"{file}, the line that begins with {text[:40]!r}: {error}") from error
        for found in () if is_follower() else lines.files:
            _LOG.info(
                "  %s: %s lines, of which an epoch shows %s; %s held-out transcripts left out",
                found.path.name, f"{found.num_lines:,}", f"{found.num_shown:,}", f"{found.num_held_out:,}",
            )  # fmt: skip
            unknown = [c for c in sorted(found.characters) if vocabulary.token_id(UNKNOWN) in vocabulary.encode_text(c)]
            if unknown:
                _LOG.warning(
                    "  %s: the vocabulary lacks %s, trained as %s: name the file in vocab.extra_text too",
                    found.path.name, " ".join(unknown), UNKNOWN,
                )  # fmt: skip
        yield lambda epoch: [example(text) for text in lines.epoch(epoch)]


def held_out_texts(run: RunFolder, vocabulary: JointVocabulary) -> set[str]:
    """Return the transcripts of all splits but the training split."""
    splits = [split for split in read_summary(run.units)["splits"] if split != "train"]
    return {
        utterance.text
        for split in splits
        for utterance in read_units(run.units, split, expect_fingerprint=vocabulary.units_fingerprint)
    }
