"""Word and character errors of transcripts: utterance by utterance, and summed with their uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np
from jaxtyping import Real

NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was to be said in one utterance and what was heard, both normalized, with the errors between them.

    Attributes:
        id: the utterance.
        split: its split.
        task: `asr` if a model transcribed speech, `tts` if a recognizer listened to a model's speech, or what else
            was listened to.
        reference: what was to be said; not empty.
        hypothesis: what was heard.
        word_errors: substitutions, deletions and insertions of words.
        words: words of the reference.
        character_errors: the same of characters.
        characters: characters of the reference, spaces included.
    """

    id: str
    split: str
    task: str
    reference: str
    hypothesis: str
    word_errors: int
    words: int
    character_errors: int
    characters: int


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors over reference length, summed over a corpus, and a 95 % interval of their rate in percent.

    The interval is the percentile bootstrap over utterances (`bootstrap_interval`): it says how much another sample
    of utterances would change the rate, not another training of the model.
    """

    errors: int
    length: int
    utterances: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Error rate in percent; above 100 where insertions abound."""
        return 100 * self.errors / self.length


def score_transcript(*, id: str, split: str, task: str, reference: str, hypothesis: str) -> Transcript:
    """Count the errors of one utterance."""
    assert reference, f"{id} has an empty reference"
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return Transcript(
        id=id,
        split=split,
        task=task,
        reference=reference,
        hypothesis=hypothesis,
        word_errors=words.substitutions + words.deletions + words.insertions,
        words=words.substitutions + words.deletions + words.hits,
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
        characters=characters.substitutions + characters.deletions + characters.hits,
    )


def sum_errors(transcripts: Sequence[Transcript], unit: Literal["words", "characters"]) -> Errors:
    """Sum the errors of a corpus; the rate is of sums, not a mean of rates."""
    assert transcripts, "errors of nothing"
    if unit == "words":
        counts = np.array([(t.word_errors, t.words) for t in transcripts])
    else:
        counts = np.array([(t.character_errors, t.characters) for t in transcripts])
    errors, lengths = counts.T
    low, high = bootstrap_interval(errors, lengths)
    return Errors(errors=int(errors.sum()), length=int(lengths.sum()), utterances=len(transcripts), low=low, high=high)


def bootstrap_interval(
    errors: Real[np.ndarray, "utterances"],
    lengths: Real[np.ndarray, "utterances"],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of 100 * sum(errors) / sum(lengths) over utterances.

    Utterances are drawn with replacement, as many as there are, `num_resamples` times; the interval leaves
    (1 - level) / 2 of the resampled rates on each side (Efron 1979; for word error rates Bisani and Ney 2004).

    Args:
        errors: of each utterance.
        lengths: of each utterance's reference, at least 1.
        num_resamples: how often.
        seed: of the draws, so that the same counts have the same interval.
        level: what the interval covers.
    """
    random = np.random.default_rng(seed)
    rates = np.empty(num_resamples)
    for index in range(num_resamples):
        drawn = random.integers(len(errors), size=len(errors))
        rates[index] = 100 * errors[drawn].sum() / lengths[drawn].sum()
    low, high = np.percentile(rates, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
