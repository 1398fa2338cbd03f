"""The first step of a run: check every recording, hold some out, and write one manifest.

Reads any number of corpora; writes `manifest.tsv` (accepted utterances), `prepare.json` (what is in it) and
`rejected.jsonl` (what was left out and why) into the run folder. Rows pass through a `Spool`, so memory does not
grow with their number.
"""

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from sparq.audio.corpora import read_corpus
from sparq.audio.manifest import Fault, Row, Utterance, check_name, write_manifest
from sparq.audio.splits import HeldOut, split_source
from sparq.audio.spool import Spool
from sparq.audio.summary import PrepareReport, summarize
from sparq.audio.waveform import MAX_SECONDS, measure_waveform
from sparq.errors import SparqError
from sparq.files import atomic_path, write_json
from sparq.progress import progress
from sparq.types import Seconds

SECONDS_TOLERANCE: Seconds = 0.5
"""Largest accepted difference between the length that a manifest states and the measured one."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus to take utterances from.

    Attributes:
        path: a manifest, or the folder of a corpus in another format.
        corpus: its name; ids become `<corpus>-<id>`. It replaces a `corpus` column of a manifest.
        format: a name in `sparq.audio.corpora.FORMATS`.
        subsets: the parts of the corpus to read; all that are there if empty.
        splits: `published` keeps the splits that the corpus comes with, if it has any; `drawn` takes
            `held_out` anyway.
        held_out: what not to train on, unless the corpus decides.
    """

    path: Path
    corpus: str
    format: str = "manifest"
    subsets: tuple[str, ...] = ()
    splits: Literal["published", "drawn"] = "published"
    held_out: HeldOut = dataclasses.field(default_factory=HeldOut)


def prepare(
    sources: Sequence[Source],
    *,
    out: Path,
    skip_bad: bool = False,
    max_seconds: Seconds = MAX_SECONDS,
    workers: int = 2,
) -> PrepareReport:
    """Check all recordings of all sources and write `manifest.tsv`, `prepare.json` and `rejected.jsonl` into `out`.

    Every file is decoded to its end; its measured length replaces the one that the corpus states. Splits
    are assigned before files are checked, so a bad file never moves another utterance to another split. Order
    of the sources and of their rows is kept, whatever the number of workers, and no more audio is in memory
    than one block for each worker.

    Args:
        sources: what to read, and the names of the corpora.
        out: the run folder.
        skip_bad: leave out and list utterances with unfit text, times or audio; else the first one is an
            error (unfit text and times are found first, before any audio is decoded).
        max_seconds: the longest utterance to accept.
        workers: threads that decode; soundfile and soxr work outside of Python's lock.

    Raises:
        SparqError: a corpus is unfit as a whole, two utterances get the same id, a file is bad and
            `skip_bad` is off, or nothing is left to train on.
    """
    if not sources:
        raise SparqError("no sources: name at least one manifest")
    with Spool() as spool:
        for number in range(len(sources)):
            _collect(spool, sources, number, skip_bad=skip_bad)
        _check_audio(spool, max_seconds=max_seconds, skip_bad=skip_bad, workers=workers)
        report = summarize(row for _, row in spool.rows())
        if not any(part.split == "train" for part in report.parts):
            raise SparqError(
                f"no utterance is left in the split 'train' ({report.utterances} accepted, {report.rejected}"
                " rejected): check the splits, the held-out rule and the rejected files"
            )
        write_manifest(out / "manifest.tsv", spool.utterances())
        _write_rejected(out / "rejected.jsonl", spool.faults())
    write_json(out / "prepare.json", dataclasses.asdict(report))
    return report


def _collect(spool: Spool, sources: Sequence[Source], number: int, *, skip_bad: bool) -> None:
    """Read one source; ids get their corpus, splits are assigned."""
    source = sources[number]
    check_name(source.corpus, f"corpus of {source.path}:")
    with progress(f"reading {source.corpus}", unit="row") as bar:
        for row in read_corpus(source.format, source.path, source.subsets):
            if isinstance(row, Fault):
                if not skip_bad:
                    raise SparqError(row.reason)
            else:
                split = "" if source.splits == "drawn" else row.split
                row = dataclasses.replace(row, corpus=source.corpus, split=split)
            id_ = f"{source.corpus}-{row.id}"
            if other := spool.add(number, row, id_):
                other_source, other_path = other
                if other_source == number:
                    raise SparqError(
                        f"{source.path}: duplicate id {row.id!r} ({other_path} and {row.path}): ids must be unique"
                    )
                raise SparqError(
                    f"id {id_!r} comes from {sources[other_source].path} and from {source.path}:"
                    " give each source another corpus name"
                )
            bar.update()
    try:
        split_source(spool, number, source.held_out)
    except SparqError as error:
        raise SparqError(f"{source.path}: {error}") from error


def _check_audio(spool: Spool, *, max_seconds: Seconds, skip_bad: bool, workers: int) -> None:
    """Put the measured utterance, or what is wrong with it, in the place of each row."""

    def check(item: tuple[int, Row]) -> tuple[int, Row]:
        number, row = item
        return number, row if isinstance(row, Fault) else _check(row, max_seconds)

    with (
        progress("checking audio", total=len(spool), unit="file") as bar,
        contextlib.closing(_map_in_order(check, spool.rows(), workers)) as checked,
    ):
        for number, row in checked:
            if isinstance(row, Fault) and not skip_bad:
                raise SparqError(row.reason)
            spool.replace(number, row)
            bar.update()


def _check(row: Utterance, max_seconds: Seconds) -> Row:
    """Return the utterance with its measured length, or what is wrong with its audio."""
    try:
        seconds = measure_waveform(row.path, segment=row.segment, max_seconds=max_seconds)
    except SparqError as error:
        return Fault(id=row.id, path=row.path, reason=f"utterance {row.id!r}: {error}")
    if row.seconds and abs(seconds - row.seconds) > SECONDS_TOLERANCE:
        reason = (
            f"utterance {row.id!r}: {row.path} lasts {seconds:.3f} s, but its manifest says"
            f" {row.seconds:.3f} s: correct the manifest or the file"
        )
        return Fault(id=row.id, path=row.path, reason=reason)
    return dataclasses.replace(row, seconds=seconds)


def _write_rejected(path: Path, faults: Iterator[Fault]) -> None:
    """Write one JSON object a line; the file is there even if it is empty."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for fault in faults:
            record = {"id": fault.id, "path": str(fault.path), "reason": fault.reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Map in threads, results in order; a few calls are under way at a time, none starts after the end."""
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(max_workers=workers) as executor:
        try:
            for item in items:
                pending.append(executor.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
