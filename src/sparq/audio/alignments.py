"""Phones in time: NIST CTM files and Praat TextGrids."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparq.errors import SparqError
from sparq.files import read_text
from sparq.types import Seconds

SILENCE = frozenset({"", "sil", "sp", "spn", "<eps>"})
"""Labels of no phone: aligners write them in pauses and over what they did not understand."""

_ROUNDING: Seconds = 0.015
"""A CTM file rounds starts and durations, often to hundredths: neighbors are up to three roundings apart."""

_TIER = re.compile(r"item \[\d+\]:")
_INTERVAL = re.compile(r'xmin = (\S+)\s+xmax = (\S+)\s+text = "((?:[^"]|"")*)"')
_STRESS = re.compile(r"(?<=[A-Za-z])[0-9]$")


@dataclass(frozen=True, kw_only=True)
class Phone:
    """A phone from `start` to `end`; stress marks are gone (`AH0` is `AH`)."""

    start: Seconds
    end: Seconds
    label: str


@dataclass(frozen=True, kw_only=True)
class Triphone:
    """A phone in context: `start` is that of the phone before it, `end` that of the phone after it."""

    start: Seconds
    end: Seconds
    label: str
    context: tuple[str, str]


def read_alignments(path: Path) -> dict[str, list[Phone]]:
    """Return the phones of each utterance, silence left out.

    Args:
        path: a CTM file (`UTTERANCE CHANNEL START DURATION PHONE` in a line), or a folder in which, at any depth,
            `UTTERANCE.TextGrid` has a tier `phones`, as the Montreal Forced Aligner writes it.

    Raises:
        SparqError: there is none, or it is not of this form.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.TextGrid"))
        if not files:
            raise SparqError(f"{path} has no .TextGrid file: give their folder, or a CTM file")
        return {file.stem: _read_text_grid(file) for file in files}
    return _read_ctm(path)


def phones_of_frames(phones: Sequence[Phone], num_frames: int, frame_rate: float) -> list[str | None]:
    """Return the phone at the center of each frame, (i + 1/2) / rate; None where there is none."""
    labels: list[str | None] = [None] * num_frames
    for phone in phones:
        for frame in frames_between(phone.start, phone.end, num_frames, frame_rate):
            labels[frame] = phone.label
    return labels


def frames_between(start: Seconds, end: Seconds, num_frames: int, frame_rate: float) -> range:
    """Return the frames, of the first `num_frames`, whose centers are from `start` to before `end`."""
    return range(max(0, _frame_after(start, frame_rate)), min(num_frames, _frame_after(end, frame_rate)))


def triphones(phones: Sequence[Phone]) -> list[Triphone]:
    """Return the phones that have one right before and one right after them; silence is between no two phones.

    Args:
        phones: of one utterance, silence left out. Gaps of up to 15 ms are taken for rounding.
    """
    phones = sorted(phones, key=lambda phone: phone.start)
    return [
        Triphone(start=before.start, end=after.end, label=phone.label, context=(before.label, after.label))
        for before, phone, after in zip(phones, phones[1:], phones[2:], strict=False)
        if abs(phone.start - before.end) <= _ROUNDING and abs(after.start - phone.end) <= _ROUNDING
    ]


def _frame_after(time: Seconds, frame_rate: float) -> int:
    """Return the first frame whose center is at or after a time."""
    # 0.1 + 0.05 is a little more than 0.15, where a frame of 20 ms has its center.
    return math.ceil(round(time * frame_rate - 0.5, 6))


def _read_ctm(path: Path) -> dict[str, list[Phone]]:
    found: dict[str, list[Phone]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        fields = line.split()
        try:
            start, duration = float(fields[2]), float(fields[3])
            label = fields[4]
        except (IndexError, ValueError):
            raise SparqError(
                f"{path}, line {number} is {line.strip()!r}: expected UTTERANCE CHANNEL START DURATION PHONE"
            ) from None
        _add(found.setdefault(fields[0], []), start, start + duration, label)
    return found


def _read_text_grid(path: Path) -> list[Phone]:
    for tier in _TIER.split(read_text(path))[1:]:
        if re.search(r'name = "phones?"', tier):
            phones: list[Phone] = []
            for start, end, label in _INTERVAL.findall(tier):
                _add(phones, float(start), float(end), label.replace('""', '"'))
            return phones
    raise SparqError(f"{path} has no tier named phones: align to phones, and write TextGrids in the long format")


def _add(phones: list[Phone], start: Seconds, end: Seconds, label: str) -> None:
    if label.strip().lower() not in SILENCE:
        phones.append(Phone(start=start, end=end, label=_STRESS.sub("", label.strip())))
