"""ASR: word error rate of what the model writes down."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True, kw_only=True)
class Transcribed:
    """One utterance's reference and hypothesis, both normalized."""

    id: str
    split: str
    reference: str
    hypothesis: str


@dataclass(frozen=True, kw_only=True)
class WordErrors:
    """Substitutions, deletions and insertions over the words of the references, summed over the corpus."""

    errors: int
    words: int
    utterances: int

    @property
    def rate(self) -> float:
        """Word error rate in percent; above 100 where insertions abound."""
        return 100 * self.errors / self.words


def word_errors(transcripts: Sequence[Transcribed]) -> WordErrors:
    """Count the word errors of a corpus; the rate is of sums, not a mean of rates."""
    assert transcripts, "word errors of nothing"
    measured = jiwer.process_words([t.reference for t in transcripts], [t.hypothesis for t in transcripts])
    return WordErrors(
        errors=measured.substitutions + measured.deletions + measured.insertions,
        words=measured.substitutions + measured.deletions + measured.hits,
        utterances=len(transcripts),
    )
