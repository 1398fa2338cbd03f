"""TTS without sound: error rate of the generated units."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from sparq.tokens.special import units_to_text


@dataclass(frozen=True, kw_only=True)
class UnitErrors:
    """Edits between generated and reference units, both de-duplicated, over the reference units.

    It punishes every difference in wording, voice and timing alike, so it stays high for a good model: the prompt does
    not say whose voice is wanted. It serves to compare models, not to judge how speech sounds.
    """

    errors: int
    units: int
    utterances: int

    @property
    def rate(self) -> float:
        """Unit error rate in percent."""
        return 100 * self.errors / self.units


def unit_errors(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]]) -> UnitErrors:
    """Count insertions, deletions and substitutions of units over a corpus."""
    assert references, "unit errors of nothing"
    measured = jiwer.process_characters(
        [units_to_text(units) for units in references], [units_to_text(units) for units in hypotheses]
    )
    return UnitErrors(
        errors=measured.substitutions + measured.deletions + measured.insertions,
        units=measured.substitutions + measured.deletions + measured.hits,
        utterances=len(references),
    )
