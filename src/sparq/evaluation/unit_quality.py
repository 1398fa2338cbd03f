"""What units keep of phones, and how many bits they take."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer


@dataclass(frozen=True, kw_only=True)
class UnitQuality:
    """Units against the phones of the same frames (Hsu et al. 2021, HuBERT, section 4.3).

    With the frequencies p(y, z) of phone y and unit z in a frame:

    Attributes:
        pnmi: phone-normalized mutual information, I(y; z) / H(y): the share of a phone's uncertainty that its unit
            takes away; 0 to 1.
        phone_purity: sum over z of max over y of p(y, z): accuracy if each unit is read as its most frequent phone.
        cluster_purity: sum over y of max over z of p(y, z): share of frames that are in their phone's most frequent
            unit. One unit for all has 1, so it is read beside the phone purity.
        phones: distinct phones.
        units: distinct units.
        frames: frames that were counted.
    """

    pnmi: float
    phone_purity: float
    cluster_purity: float
    phones: int
    units: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class BitRate:
    """What units cost (Dunbar et al. 2019, ZeroSpeech): units a second times their entropy.

    Attributes:
        bits_per_second: of the units as they are written; the durations of de-duplicated units are not in it.
        entropy: of a unit, in bits, by the frequencies of single units.
        units_per_second: how many are written in a second of speech.
        used: distinct units.
    """

    bits_per_second: float
    entropy: float
    units_per_second: float
    used: int


def unit_quality(pairs: Iterable[tuple[str, int]]) -> UnitQuality:
    """Return how well units tell phones apart.

    Args:
        pairs: phone and unit of each frame, at least one.
    """
    counts = Counter(pairs)
    assert counts, "quality of nothing"
    phones = {phone: i for i, phone in enumerate(sorted({phone for phone, _ in counts}))}
    units = {unit: i for i, unit in enumerate(sorted({unit for _, unit in counts}))}
    joint = np.zeros((len(phones), len(units)))  # phones units
    for (phone, unit), count in counts.items():
        joint[phones[phone], units[unit]] = count
    num_frames = int(joint.sum())
    joint /= num_frames
    of_phone, of_unit = joint.sum(axis=1), joint.sum(axis=0)
    seen = joint > 0
    information = float((joint[seen] * np.log2(joint[seen] / np.outer(of_phone, of_unit)[seen])).sum())
    uncertainty = float(-(of_phone * np.log2(of_phone)).sum())
    return UnitQuality(
        # One phone leaves nothing to learn.
        pnmi=information / uncertainty if uncertainty > 0 else 0.0,
        phone_purity=float(joint.max(axis=0).sum()),
        cluster_purity=float(joint.max(axis=1).sum()),
        phones=len(phones),
        units=len(units),
        frames=num_frames,
    )


def bit_rate(sequences: Sequence[Integer[np.ndarray, "_units"]], seconds: float) -> BitRate:
    """Return the bit rate of units.

    Args:
        sequences: the units of each utterance, as written; at least one unit in all.
        seconds: how long the utterances are together.
    """
    _, counts = np.unique(np.concatenate(sequences), return_counts=True)
    shares = counts / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    per_second = float(counts.sum()) / seconds
    return BitRate(bits_per_second=entropy * per_second, entropy=entropy, units_per_second=per_second, used=len(counts))
