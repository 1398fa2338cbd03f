"""Word alignment of a hypothesis with its reference, so that a reader sees the errors that WER counts."""

from dataclasses import dataclass
from typing import Literal

import jiwer

Kind = Literal["equal", "inserted", "deleted"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive words of both texts, or only of the hypothesis (`inserted`) or reference (`deleted`)."""

    kind: Kind
    text: str


def align(reference: str, hypothesis: str) -> tuple[Segment, ...]:
    """Return the minimum-edit alignment by words; a substitution is a deletion followed by an insertion.

    Texts are split at white space and compared as they are, so pass the normalized texts that were scored.
    """
    expected, heard = reference.split(), hypothesis.split()
    if not expected:
        return _segment("inserted", heard)
    chunks = jiwer.process_words(" ".join(expected), " ".join(heard)).alignments[0]
    segments: list[Segment] = []
    for chunk in chunks:
        wanted = expected[chunk.ref_start_idx : chunk.ref_end_idx]
        found = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            segments += _segment("equal", wanted)
        else:
            segments += _segment("deleted", wanted) + _segment("inserted", found)
    return tuple(segments)


def _segment(kind: Kind, words: list[str]) -> tuple[Segment, ...]:
    return (Segment(kind=kind, text=" ".join(words)),) if words else ()
