"""What the first step of a run accepted and rejected, as data and as text."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from sparq.audio.manifest import Fault, Utterance
from sparq.types import Seconds

HISTOGRAM_EDGES: tuple[Seconds, ...] = (0.0, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
"""Lower edges of the duration histogram; the last bin is open, 30 s is a window of Whisper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What one corpus gives to one split.

    Attributes:
        corpus: name of the corpus.
        split: name of the split.
        utterances: number of utterances.
        with_text: number of utterances that have text.
        speakers: number of different speakers; speakers without a name count as none.
        hours: length in hours.
    """

    corpus: str
    split: str
    utterances: int
    with_text: int
    speakers: int
    hours: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DurationBin:
    """Number of utterances of `lower <= seconds < upper`; the last bin has no `upper`."""

    lower: Seconds
    upper: Seconds | None
    utterances: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """An utterance that was left out."""

    id: str
    path: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote; the content of `prepare.json`.

    Attributes:
        parts: one summary for each corpus and split that is not empty.
        durations: histogram over all accepted utterances.
        text_characters: how often each character occurs in all texts.
        rejected: utterances left out, in the order of the manifests.
    """

    parts: tuple[PartSummary, ...]
    durations: tuple[DurationBin, ...]
    text_characters: dict[str, int]
    rejected: tuple[Rejected, ...]

    @property
    def utterances(self) -> int:
        """Number of accepted utterances."""
        return sum(part.utterances for part in self.parts)

    @property
    def hours(self) -> float:
        """Length of all accepted utterances in hours."""
        return sum(part.hours for part in self.parts)


def summarize(accepted: Sequence[Utterance], rejected: Sequence[Fault]) -> PrepareReport:
    """Count the accepted utterances by corpus and split, by length and by character; list the rejected."""
    groups: dict[tuple[str, str], list[Utterance]] = {}
    for utterance in accepted:
        groups.setdefault((utterance.corpus, utterance.split), []).append(utterance)
    parts = tuple(
        PartSummary(
            corpus=corpus,
            split=split,
            utterances=len(group),
            with_text=sum(bool(u.text) for u in group),
            speakers=len({u.speaker for u in group} - {""}),
            hours=sum(u.seconds for u in group) / 3600,
        )
        for (corpus, split), group in sorted(groups.items())
    )
    uppers = (*HISTOGRAM_EDGES[1:], None)
    durations = tuple(
        DurationBin(
            lower=lower,
            upper=upper,
            utterances=sum(lower <= u.seconds and (upper is None or u.seconds < upper) for u in accepted),
        )
        for lower, upper in zip(HISTOGRAM_EDGES, uppers, strict=True)
    )
    characters = Counter(character for utterance in accepted for character in utterance.text)
    return PrepareReport(
        parts=parts,
        durations=durations,
        text_characters=dict(sorted(characters.items())),
        rejected=tuple(Rejected(id=fault.id, path=str(fault.path), reason=fault.reason) for fault in rejected),
    )


def format_report(report: PrepareReport, *, max_rejected: int = 10) -> str:
    """Return the report as text for a terminal: a table, a histogram and the first rejected utterances."""
    header = ("corpus", "split", "utterances", "with text", "speakers", "hours")
    rows = [
        (p.corpus, p.split, str(p.utterances), str(p.with_text), str(p.speakers), f"{p.hours:.3f}")
        for p in report.parts
    ]
    with_text = sum(part.with_text for part in report.parts)
    rows.append(("total", "", str(report.utterances), str(with_text), "", f"{report.hours:.3f}"))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    most = max(bin_.utterances for bin_ in report.durations)
    lines += ["", "seconds  utterances"]
    for bin_ in report.durations:
        span = f"{bin_.lower:g}-{bin_.upper:g}" if bin_.upper is not None else f"{bin_.lower:g}+"
        bar = "#" * round(40 * bin_.utterances / most)
        lines.append(f"{span:>7}  {bin_.utterances:>10}  {bar}".rstrip())
    lines += ["", f"text characters: {''.join(report.text_characters).strip() or 'none'}"]
    lines.append(f"rejected: {len(report.rejected)}")
    lines += [f"  {rejected.reason}" for rejected in report.rejected[:max_rejected]]
    if len(report.rejected) > max_rejected:
        lines.append(f"  ... and {len(report.rejected) - max_rejected} more: see prepare.json")
    return "\n".join(lines)
