"""How good the units of a run are, against alignments and by their cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparq.audio.alignments import phones_of_frames, read_alignments
from sparq.errors import SparqError
from sparq.evaluation import BitRate, UnitQuality, bit_rate, unit_quality
from sparq.units import expand, read_summary, read_units


@dataclass(frozen=True, kw_only=True)
class UnitScore:
    """Scores of one split's units.

    Attributes:
        bit_rate: of all utterances.
        quality: over the frames of aligned utterances that have a phone; None without alignments.
        aligned: utterances with an alignment.
        utterances: of the split.
        left_out: frames of aligned utterances without a phone, silence above all.
    """

    bit_rate: BitRate
    quality: UnitQuality | None
    aligned: int
    utterances: int
    left_out: int


def score_units(folder: Path, split: str, alignments: Path | None) -> UnitScore:
    """Score the units of a split.

    Args:
        folder: where units live, `RUN/units`.
        split: name of the split.
        alignments: CTM file or folder of TextGrids; their utterances are the run's ids, with or without `CORPUS-`.

    Raises:
        SparqError: no such units, or no alignment fits any of them.
    """
    rate = float(read_summary(folder)["frame_rate"])
    utterances = list(read_units(folder, split))
    cost = bit_rate([u.units for u in utterances], sum(u.seconds for u in utterances))
    if alignments is None:
        return UnitScore(bit_rate=cost, quality=None, aligned=0, utterances=len(utterances), left_out=0)
    phones = read_alignments(alignments)
    known = {u.id: phones.get(u.id, phones.get(u.id.removeprefix(f"{u.corpus}-"))) for u in utterances}
    left_out = 0

    def pairs() -> Iterator[tuple[str, int]]:
        nonlocal left_out
        for utterance in utterances:
            found = known[utterance.id]
            if found is None:
                continue
            frames = expand(utterance.units, utterance.durations).tolist()
            for phone, unit in zip(phones_of_frames(found, len(frames), rate), frames, strict=True):
                if phone is None:
                    left_out += 1
                else:
                    yield phone, unit

    counted = list(pairs())
    if not counted:
        example = next(iter(phones), "none")
        raise SparqError(
            f"no alignment in {alignments} fits an utterance of split {split!r}: it has {example!r}, the units"
            f" {utterances[0].id!r}"
        )
    return UnitScore(
        bit_rate=cost,
        quality=unit_quality(counted),
        aligned=sum(found is not None for found in known.values()),
        utterances=len(utterances),
        left_out=left_out,
    )
