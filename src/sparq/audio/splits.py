"""Held-out parts: chosen by a hash of names, so neither row order nor a random generator matters."""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

from sparq.audio.manifest import Utterance, check_split
from sparq.audio.spool import Spool, rank
from sparq.errors import SparqError, near_matches


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How to hold utterances of a corpus out of training.

    Attributes:
        test_speakers: these speakers are tested on, and `test_fraction` is not used.
        test_fraction: the part of all utterances, 0 to 1, to test on if no speakers are named.
        valid_fraction: the part of all utterances, 0 to 1, to validate on. They are chosen by utterance among
            those that are not tested on, so their speakers are heard in training too.
        speaker_disjoint: `test_fraction` takes whole speakers, in the order of their hash, until it is
            reached; the last one can overshoot it. False takes single utterances.
        test_split: name of the tested split; it starts with `test`.
        seed: another seed is another choice.
    """

    test_speakers: tuple[str, ...] = ()
    test_fraction: float = 0.0
    valid_fraction: float = 0.0
    speaker_disjoint: bool = True
    test_split: str = "test"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("test_fraction", "valid_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise SparqError(f"{name} is {value}: give a part from 0 to 1")
        if self.test_fraction + self.valid_fraction > 1:
            raise SparqError(
                f"test_fraction {self.test_fraction} and valid_fraction {self.valid_fraction}"
                " are more than 1 together: lower one"
            )
        check_split(self.test_split, "test_split")
        if not self.test_split.startswith("test"):
            raise SparqError(f"test_split {self.test_split!r} must start with 'test', e.g. 'test-unseen-voice'")


def assign_splits(utterances: Iterable[Utterance], rule: HeldOut) -> list[Utterance]:
    """Return the utterances, in their order, each with its split; see `split_source`."""
    with Spool() as spool:
        for utterance in utterances:
            if spool.add(0, utterance, utterance.id):
                raise SparqError(f"duplicate id {utterance.id!r}: ids must be unique")
        split_source(spool, 0, rule)
        return list(spool.utterances())


def split_source(spool: Spool, source: int, rule: HeldOut) -> None:
    """Give each utterance of a source its split.

    Utterances that all have a split keep it. Otherwise speakers (or utterances) are sorted by
    SHA-256(seed, kind, name) and taken until the fraction is reached.

    Args:
        spool: holds the utterances, and is changed.
        source: number of the source.
        rule: what to hold out.

    Raises:
        SparqError: a part of the utterances has a split and a part has not, a test speaker does not occur,
            utterances lack the speaker that a speaker-disjoint choice needs, or nothing would be left to
            train on.
    """
    total = spool.count(source)
    with_split = spool.count(source, "split != ''")
    if with_split == total:
        return
    if with_split:
        without = spool.first(source, "split = ''")
        raise SparqError(f"utterance {without!r} has no split, but {with_split} others have one: fill all or none")
    _choose_test(spool, source, rule, total)
    rest = spool.count(source, "split = ''")
    num_valid = min(_at_least(rule.valid_fraction, total), rest)
    spool.set_split(source, "valid", kind="valid", seed=rule.seed, most=num_valid)
    if num_valid == rest and rule.test_fraction + rule.valid_fraction < 1:
        raise SparqError(
            f"nothing is left to train on: {total} utterances of {len(spool.speakers(source))} speakers are too few;"
            " lower the fractions, name fewer test speakers or set speaker_disjoint to false"
        )
    spool.set_split(source, "train")


def _choose_test(spool: Spool, source: int, rule: HeldOut, total: int) -> None:
    """Give the utterances to test on to their split."""
    wanted = _at_least(rule.test_fraction, total)
    if rule.test_speakers:
        counts = spool.speakers(source)
        for speaker in rule.test_speakers:
            if speaker not in counts:
                raise SparqError(f"no utterance of test speaker {speaker!r}: {near_matches(speaker, sorted(counts))}")
            spool.set_speaker_split(source, speaker, rule.test_split)
    elif wanted and not rule.speaker_disjoint:
        spool.set_split(source, rule.test_split, kind="test", seed=rule.seed, most=wanted)
    elif wanted:
        nameless = spool.first(source, "speaker = ''")
        if nameless is not None:
            raise SparqError(
                f"utterance {nameless!r} has no speaker, so no speaker-disjoint test split can be made:"
                " fill the column 'speaker' or set speaker_disjoint to false"
            )
        counts, taken = spool.speakers(source), 0
        for speaker in sorted(counts, key=lambda name: rank(rule.seed, "speaker", name)):
            if taken >= wanted:
                break
            spool.set_speaker_split(source, speaker, rule.test_split)
            taken += counts[speaker]


def _at_least(fraction: float, total: int) -> int:
    """Return the least count that is `fraction` of `total`; 0.1 of 30 is 3, although 0.1 * 30 > 3."""
    return math.ceil(Fraction(repr(float(fraction))) * total)
