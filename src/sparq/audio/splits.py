"""Held-out parts: chosen by a hash of names, so neither row order nor a random generator matters."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from sparq.audio.manifest import Utterance, check_split
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


def assign_splits(utterances: Sequence[Utterance], rule: HeldOut) -> list[Utterance]:
    """Return the utterances, in their order, each with its split.

    Utterances that all have a split keep it. Otherwise speakers (or utterances) are sorted by
    SHA-256(seed, kind, name) and taken until the fraction is reached.

    Raises:
        SparqError: a part of the utterances has a split and a part has not, a test speaker does not occur,
            utterances lack the speaker that a speaker-disjoint choice needs, or nothing would be left to
            train on.
    """
    with_split = sum(bool(u.split) for u in utterances)
    if with_split == len(utterances):
        return list(utterances)
    if with_split:
        without = next(u for u in utterances if not u.split)
        raise SparqError(f"utterance {without.id!r} has no split, but {with_split} others have one: fill all or none")
    test = _choose_test(utterances, rule)
    rest = [u.id for u in utterances if u.id not in test]
    num_valid = min(_at_least(rule.valid_fraction, len(utterances)), len(rest))
    valid = set(sorted(rest, key=lambda id_: _rank(rule.seed, "valid", id_))[:num_valid])
    if not set(rest) - valid and rule.test_fraction + rule.valid_fraction < 1:
        speakers = len({u.speaker for u in utterances})
        raise SparqError(
            f"nothing is left to train on: {len(utterances)} utterances of {speakers} speakers are too few;"
            " lower the fractions, name fewer test speakers or set speaker_disjoint to false"
        )
    names = {**dict.fromkeys(test, rule.test_split), **dict.fromkeys(valid, "valid")}
    return [dataclasses.replace(u, split=names.get(u.id, "train")) for u in utterances]


def _choose_test(utterances: Sequence[Utterance], rule: HeldOut) -> set[str]:
    """Return the ids to test on."""
    counts = Counter(u.speaker for u in utterances)
    if rule.test_speakers:
        for speaker in rule.test_speakers:
            if speaker not in counts:
                raise SparqError(f"no utterance of test speaker {speaker!r}: {near_matches(speaker, sorted(counts))}")
        return {u.id for u in utterances if u.speaker in rule.test_speakers}
    wanted = _at_least(rule.test_fraction, len(utterances))
    if not wanted:
        return set()
    if not rule.speaker_disjoint:
        ids = sorted((u.id for u in utterances), key=lambda id_: _rank(rule.seed, "test", id_))
        return set(ids[:wanted])
    if "" in counts:
        nameless = next(u.id for u in utterances if not u.speaker)
        raise SparqError(
            f"utterance {nameless!r} has no speaker, so no speaker-disjoint test split can be made:"
            " fill the column 'speaker' or set speaker_disjoint to false"
        )
    chosen: set[str] = set()
    for speaker in sorted(counts, key=lambda name: _rank(rule.seed, "speaker", name)):
        if sum(counts[name] for name in chosen) >= wanted:
            break
        chosen.add(speaker)
    return {u.id for u in utterances if u.speaker in chosen}


def _at_least(fraction: float, total: int) -> int:
    """Return the least count that is `fraction` of `total`; 0.1 of 30 is 3, although 0.1 * 30 > 3."""
    return math.ceil(Fraction(repr(float(fraction))) * total)


def _rank(seed: int, kind: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\t{kind}\t{name}".encode()).digest()
