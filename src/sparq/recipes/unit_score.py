"""How good the units of a run are, against alignments and by their cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparq.audio.alignments import Phone, frames_between, phones_of_frames, read_alignments, triphones
from sparq.errors import SparqError
from sparq.evaluation import (
    AbxErrors,
    AbxItem,
    BitRate,
    UnitQuality,
    abx_errors,
    angular_distances,
    bit_rate,
    identity_distances,
    unit_quality,
)
from sparq.units import KMeans, UnitUtterance, expand, read_summary, read_units

FrameDistance = Literal["angular", "identity"]
"""Of two units in ABX: the angle between their centroids, or 1 if they differ."""


@dataclass(frozen=True, kw_only=True)
class UnitScore:
    """Scores of one split's units.

    Attributes:
        bit_rate: of all utterances.
        quality: over the frames of aligned utterances that have a phone; None without alignments.
        aligned: utterances with an alignment.
        utterances: of the split.
        left_out: frames of aligned utterances without a phone, silence above all.
        abx: over the phones that have a phone right before and right after them; None if it was not asked for.
        left_out_of_abx: phones of aligned utterances that have not, or that have no frame.
    """

    bit_rate: BitRate
    quality: UnitQuality | None
    aligned: int
    utterances: int
    left_out: int
    abx: AbxErrors | None = None
    left_out_of_abx: int = 0


def score_units(
    folder: Path, split: str, alignments: Path | None, *, abx: FrameDistance | None = None, seed: int = 0
) -> UnitScore:
    """Score the units of a split.

    Args:
        folder: where units live, `RUN/units`.
        split: name of the split.
        alignments: CTM file or folder of TextGrids; their utterances are the run's ids, with or without `CORPUS-`.
        abx: how frames are compared, to measure ABX too; it needs alignments.
        seed: of ABX's draws.

    Raises:
        SparqError: no such units, no alignment fits any of them, or ABX finds nothing to compare.
    """
    if abx is not None and alignments is None:
        raise SparqError("ABX compares phones: give their --alignments too")
    rate = float(read_summary(folder)["frame_rate"])
    kmeans = None if abx is None else KMeans.load(folder / "kmeans.safetensors")
    utterances = list(read_units(folder, split, expect_fingerprint=kmeans.fingerprint if kmeans else None))
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
    aligned = [(utterance, found) for utterance in utterances if (found := known[utterance.id]) is not None]
    errors = None
    if kmeans is not None:
        distances = angular_distances(kmeans.centroids) if abx == "angular" else identity_distances(kmeans.k)
        items = [item for utterance, found in aligned for item in _items(utterance, found, rate)]
        errors = abx_errors(items, distances, seed=seed)
        if errors.within is None and errors.across is None:
            raise SparqError(
                f"ABX finds nothing to compare in split {split!r}: of {len(items)} phones between two others none is"
                " said twice between the same two, with another phone said there too"
            )
    return UnitScore(
        bit_rate=cost,
        quality=unit_quality(counted),
        aligned=len(aligned),
        utterances=len(utterances),
        left_out=left_out,
        abx=errors,
        left_out_of_abx=0 if errors is None else sum(len(found) for _, found in aligned) - errors.items,
    )


def _items(utterance: UnitUtterance, phones: Sequence[Phone], rate: float) -> Iterator[AbxItem]:
    if not utterance.speaker:
        raise SparqError(f"utterance {utterance.id!r} has no speaker, which ABX needs: fill the manifest's column")
    frames = expand(utterance.units, utterance.durations)
    for phone in triphones(phones):
        span = frames_between(phone.start, phone.end, len(frames), rate)
        if span:
            yield AbxItem(
                phone=phone.label,
                context=phone.context,
                # Speakers have names of their own in each corpus.
                speaker=f"{utterance.corpus}/{utterance.speaker}",
                units=frames[span.start : span.stop],
            )
