"""What the first step of a run accepted and rejected, as data and as text."""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterable

from sparq.audio.manifest import Fault, Row, Utterance
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


MAX_EXAMPLES = 10
"""Rejected utterances that a report names; all of them are in `rejected.jsonl`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote; the content of `prepare.json`.

    Attributes:
        parts: one summary for each corpus and split that is not empty.
        durations: histogram over all accepted utterances.
        text_characters: how often each character occurs in all texts.
        rejected: number of utterances left out.
        reasons: why, for the first of them.
    """

    parts: tuple[PartSummary, ...]
    durations: tuple[DurationBin, ...]
    text_characters: dict[str, int]
    rejected: int
    reasons: tuple[str, ...]

    @property
    def utterances(self) -> int:
        """Number of accepted utterances."""
        return sum(part.utterances for part in self.parts)

    @property
    def hours(self) -> float:
        """Length of all accepted utterances in hours."""
        return sum(part.hours for part in self.parts)


def summarize(rows: Iterable[Row]) -> PrepareReport:
    """Count utterances by corpus and split, by length and by character, and those left out, in one pass.

    Memory grows with the number of speakers, not with the number of utterances.
    """
    parts: dict[tuple[str, str], _Part] = {}
    bins = [0] * len(HISTOGRAM_EDGES)
    characters: Counter[str] = Counter()
    rejected, reasons = 0, []
    for row in rows:
        if isinstance(row, Fault):
            rejected += 1
            if rejected <= MAX_EXAMPLES:
                reasons.append(row.reason)
            continue
        parts.setdefault((row.corpus, row.split), _Part()).add(row)
        bins[bisect.bisect_right(HISTOGRAM_EDGES, row.seconds) - 1] += 1
        characters.update(row.text)
    uppers = (*HISTOGRAM_EDGES[1:], None)
    return PrepareReport(
        parts=tuple(
            PartSummary(
                corpus=corpus,
                split=split,
                utterances=part.utterances,
                with_text=part.with_text,
                speakers=len(part.speakers - {""}),
                hours=part.seconds / 3600,
            )
            for (corpus, split), part in sorted(parts.items())
        ),
        durations=tuple(
            DurationBin(lower=lower, upper=upper, utterances=count)
            for lower, upper, count in zip(HISTOGRAM_EDGES, uppers, bins, strict=True)
        ),
        text_characters=dict(sorted(characters.items())),
        rejected=rejected,
        reasons=tuple(reasons),
    )


class _Part:
    """What is counted of one corpus and split."""

    def __init__(self) -> None:
        self.utterances = 0
        self.with_text = 0
        self.seconds = 0.0
        self.speakers: set[str] = set()

    def add(self, utterance: Utterance) -> None:
        self.utterances += 1
        self.with_text += bool(utterance.text)
        self.seconds += utterance.seconds
        self.speakers.add(utterance.speaker)


def format_report(report: PrepareReport, *, max_rejected: int = MAX_EXAMPLES) -> str:
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
    shown = report.reasons[:max_rejected]
    lines.append(f"rejected: {report.rejected}")
    lines += [f"  {reason}" for reason in shown]
    if report.rejected > len(shown):
        lines.append(f"  ... and {report.rejected - len(shown)} more: see rejected.jsonl")
    return "\n".join(lines)
