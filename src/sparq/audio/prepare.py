"""The first step of a run: check every recording, hold some out, and write one manifest.

Reads the manifests of any number of sources; writes `manifest.tsv` (accepted utterances) and `prepare.json`
(what is in it, what was rejected and why) into the run folder.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sparq.audio.manifest import Fault, Utterance, check_name, scan_manifest, write_manifest
from sparq.audio.splits import HeldOut, assign_splits
from sparq.audio.summary import PrepareReport, summarize
from sparq.audio.waveform import MAX_SECONDS, measure_waveform
from sparq.errors import SparqError
from sparq.files import write_json
from sparq.progress import progress
from sparq.types import Seconds

SECONDS_TOLERANCE: Seconds = 0.5
"""Largest accepted difference between the length that a manifest states and the measured one."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A manifest to take utterances from.

    Attributes:
        manifest: the TSV file.
        corpus: its name; ids become `<corpus>-<id>`. It replaces a `corpus` column of the manifest.
        held_out: what not to train on; unused where the manifest has a filled `split` column.
    """

    manifest: Path
    corpus: str
    held_out: HeldOut = dataclasses.field(default_factory=HeldOut)


def prepare(
    sources: Sequence[Source],
    *,
    out: Path,
    skip_bad: bool = False,
    max_seconds: Seconds = MAX_SECONDS,
    workers: int = 2,
) -> PrepareReport:
    """Check all recordings of all sources and write `out/manifest.tsv` and `out/prepare.json`.

    Every file is decoded to its end; its measured length replaces the one that the manifest states. Splits
    are assigned before files are checked, so a bad file never moves another utterance to another split. Order
    of the sources and of their rows is kept, whatever the number of workers, and no more audio is in memory
    than one block for each worker.

    Args:
        sources: manifests with the names of their corpora.
        out: the run folder.
        skip_bad: leave out and list utterances with unfit text, seconds or audio; else the first one is an
            error (unfit text and seconds are found first, before any audio is decoded).
        max_seconds: the longest utterance to accept.
        workers: threads that decode; soundfile and soxr work outside of Python's lock.

    Raises:
        SparqError: a manifest is unfit as a whole, two utterances get the same id, a file is bad and
            `skip_bad` is off, or nothing is left to train on.
    """
    if not sources:
        raise SparqError("no sources: name at least one manifest")
    rows = _read_sources(sources)
    if not skip_bad:
        for row in rows:
            if isinstance(row, Fault):
                raise SparqError(row.reason)

    accepted: list[Utterance] = []
    rejected: list[Fault] = []
    with (
        progress("checking audio", total=len(rows), unit="file") as bar,
        contextlib.closing(_map_in_order(lambda row: _check(row, max_seconds), rows, workers)) as checked,
    ):
        for row in checked:
            if isinstance(row, Utterance):
                accepted.append(row)
            elif skip_bad:
                rejected.append(row)
            else:
                raise SparqError(row.reason)
            bar.update()
    if not any(utterance.split == "train" for utterance in accepted):
        raise SparqError(
            f"no utterance is left in the split 'train' ({len(accepted)} accepted, {len(rejected)} rejected):"
            " check the column 'split', the held-out rule and the rejected files"
        )
    report = summarize(accepted, rejected)
    write_manifest(out / "manifest.tsv", accepted)
    write_json(out / "prepare.json", dataclasses.asdict(report))
    return report


def _read_sources(sources: Sequence[Source]) -> list[Utterance | Fault]:
    """Read all manifests; ids get their corpus, splits are assigned."""
    rows: list[Utterance | Fault] = []
    origin: dict[str, Path] = {}
    for source in sources:
        check_name(source.corpus, f"corpus of {source.manifest}:")
        scanned = scan_manifest(source.manifest)
        good = [row for row in scanned if isinstance(row, Utterance)]
        try:
            with_split = {row.id: row for row in assign_splits(good, source.held_out)}
        except SparqError as error:
            raise SparqError(f"{source.manifest}: {error}") from error
        for row in scanned:
            id_ = f"{source.corpus}-{row.id}"
            if id_ in origin:
                raise SparqError(
                    f"id {id_!r} comes from {origin[id_]} and from {source.manifest}:"
                    " give each source another corpus name"
                )
            origin[id_] = source.manifest
            if isinstance(row, Utterance):
                rows.append(dataclasses.replace(with_split[row.id], id=id_, corpus=source.corpus))
            else:
                rows.append(dataclasses.replace(row, id=id_))
    return rows


def _check(row: Utterance | Fault, max_seconds: Seconds) -> Utterance | Fault:
    """Return the utterance with its measured length, or what is wrong with its audio."""
    if isinstance(row, Fault):
        return row
    try:
        seconds = measure_waveform(row.path, max_seconds=max_seconds)
    except SparqError as error:
        return Fault(id=row.id, path=row.path, reason=f"utterance {row.id!r}: {error}")
    if row.seconds and abs(seconds - row.seconds) > SECONDS_TOLERANCE:
        reason = (
            f"utterance {row.id!r}: {row.path} lasts {seconds:.3f} s, but its manifest says"
            f" {row.seconds:.3f} s: correct the manifest or the file"
        )
        return Fault(id=row.id, path=row.path, reason=reason)
    return dataclasses.replace(row, seconds=seconds)


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
