"""Manifests: which recording is whose, and what is said in it, as tab separated text.

A manifest is UTF-8 text with a header line. Columns `id` and `path` are required; `speaker`, `split`, `start`,
`seconds`, `corpus` and `text` are optional, in any order. Audio paths are relative to the manifest's folder.
There is no quoting: a field holds neither tabs nor line breaks. A row with a `start` is the part of its file
that begins there and lasts `seconds`; a row without is the whole file.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparq.audio.text import normalize_text as normalize_text
from sparq.audio.waveform import Segment
from sparq.errors import SparqError, near_matches
from sparq.files import atomic_path, read_lines
from sparq.types import Seconds

COLUMNS = ("id", "path", "speaker", "split", "start", "seconds", "corpus", "text")
REQUIRED_COLUMNS = ("id", "path")

_SPLIT = re.compile(r"train|valid|test[\w.-]*")
_BAD_IN_NAME = re.compile(r"[\s/\\\x00-\x1f\x7f]")
_BAD_IN_FIELD = re.compile(r"[\t\r\n]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording, or a part of one.

    Attributes:
        id: unique in its manifest; no path separators, no white space.
        path: the sound file.
        speaker: who speaks, or "" if the manifest does not say. Unique within `corpus` only.
        split: `train`, `valid`, a name that starts with `test`, or "" if not assigned yet.
        start: where it begins in the file, in seconds; None for the whole file.
        seconds: length in seconds, or 0 if the manifest does not say, which it must if there is a start.
        corpus: the collection it comes from, or "".
        text: what is said, normalized (`normalize_text`); "" makes it an utterance for speechlm only.
    """

    id: str
    path: Path
    speaker: str = ""
    split: str = ""
    start: Seconds | None = None
    seconds: Seconds = 0.0
    corpus: str = ""
    text: str = ""

    @property
    def segment(self) -> Segment | None:
        """The part of the file that it is, or None for the whole."""
        return None if self.start is None else Segment(start=self.start, seconds=self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """An utterance of a manifest that cannot be used, and why."""

    id: str
    path: Path
    reason: str


Row = Utterance | Fault
"""What a reader yields."""


def read_manifest(path: str | Path, *, require_audio: bool = True) -> list[Utterance]:
    """Read a manifest; text comes back normalized and audio paths absolute.

    Args:
        path: the TSV file.
        require_audio: whether every audio file must exist.

    Raises:
        SparqError: the file is missing, not UTF-8, has no rows, unknown, missing or repeated columns, a row
            with a wrong number of fields, duplicate or unfit ids, an unknown split, seconds that are no
            length, text in another script, text without any letter or digit, or (with `require_audio`) an
            audio file that is not there.
    """
    utterances: list[Utterance] = []
    first_line: dict[str, int] = {}
    for number, row in enumerate(scan_manifest(path), start=2):
        if row.id in first_line:
            raise SparqError(
                f"{path}: duplicate id {row.id!r} in lines {first_line[row.id]} and {number}: ids must be unique"
            )
        first_line[row.id] = number
        if isinstance(row, Fault):
            raise SparqError(row.reason)
        if require_audio and not row.path.is_file():
            raise SparqError(
                f"{path}, utterance {row.id!r}: no such audio file: {row.path};"
                " audio paths are relative to the manifest's folder"
            )
        utterances.append(row)
    return utterances


def scan_manifest(path: str | Path) -> Iterator[Row]:
    """Stream a manifest; a row of unfit text or times becomes a `Fault`.

    Audio files are not looked at, and ids may repeat: whoever holds them all has to look.

    Raises:
        SparqError: the manifest as a whole is unfit; see `read_manifest`.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))  # noqa: PTH100  (resolve() would follow links)
    lines = _read_lines(path)
    header = next(lines, None)
    no_rows = SparqError(f"{path} has no rows: after the header line, write a line for each utterance")
    if header is None:
        raise no_rows
    columns = _check_header(path, header.split("\t"))
    number = 1
    for number, line in enumerate(lines, start=2):
        where = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise SparqError(
                f"{where} has {len(fields)} fields, the header has {len(columns)}: separate fields by single tabs"
            )
        row = dict(zip(columns, fields, strict=True))
        check_name(row["id"], f"{where}: id")
        if not row["path"]:
            raise SparqError(f"{where}, utterance {row['id']!r}: empty path: name its audio file")
        check_split(row.get("split", ""), where)
        try:
            times = _times(row)
        except SparqError as error:
            reason = f"{where}, utterance {row['id']!r}: {error}"
            yield Fault(id=row["id"], path=folder / row["path"], reason=reason)
            continue
        yield make_row(
            where,
            id=row["id"],
            path=folder / row["path"],
            speaker=row.get("speaker", ""),
            split=row.get("split", ""),
            segment=times[0],
            seconds=times[1],
            corpus=row.get("corpus", ""),
            text=row.get("text", ""),
        )
    if number == 1:
        raise no_rows


def make_row(
    where: str,
    *,
    id: str,
    path: Path,
    speaker: str = "",
    split: str = "",
    segment: Segment | None = None,
    seconds: Seconds = 0.0,
    corpus: str = "",
    text: str = "",
) -> Row:
    """Return an utterance with its text normalized, or what is wrong with its id or text.

    Args:
        where: the place that it comes from, for messages.
        id: as in `Utterance`; it may still be unfit.
        path: the sound file.
        speaker: as in `Utterance`.
        split: as in `Utterance`.
        segment: the part of the file; its length takes the place of `seconds`.
        seconds: length of a whole file, or 0.
        corpus: as in `Utterance`.
        text: as the source spells it.
    """
    try:
        check_name(id, "id")
        normal = normalize_text(text)
        if text.strip() and not normal:
            raise SparqError(f"text {text!r} has no letter or digit: write what is said, or leave it empty")
    except SparqError as error:
        return Fault(id=id, path=path, reason=f"{where}, utterance {id!r}: {error}")
    return Utterance(
        id=id,
        path=path,
        speaker=speaker,
        split=split,
        start=None if segment is None else segment.start,
        seconds=seconds if segment is None else segment.seconds,
        corpus=corpus,
        text=normal,
    )


def check_name(name: str, what: str) -> None:
    """Refuse a name that could not be part of a file name.

    Raises:
        SparqError: it is empty or has white space, a path separator or a control character.
    """
    if not name:
        raise SparqError(f"{what} is empty: give a unique name without white space or slashes")
    bad = _BAD_IN_NAME.search(name)
    if bad:
        raise SparqError(f"{what} {name!r} contains {bad[0]!r}: use neither white space nor slashes")


def check_split(split: str, where: str) -> None:
    """Refuse a split that no later step knows; "" (not assigned) passes.

    Raises:
        SparqError: it is neither `train` nor `valid` nor starts with `test`.
    """
    if split and not _SPLIT.fullmatch(split):
        near = near_matches(split, ["train", "valid", "test", "test-<name>"])
        raise SparqError(f"{where}: unknown split {split!r}: {near}")


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest atomically, rows in the given order; the same utterances give the same bytes.

    An audio path below the manifest's folder is written relative to it, so that the folder can move; any
    other path is written absolute. Rows are written as they come.

    Raises:
        SparqError: a field holds a tab or a line break, or an id is unfit.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))  # noqa: PTH100
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for utterance in utterances:
            check_name(utterance.id, f"{path}: id")
            row = {field: str(getattr(utterance, field)) for field in COLUMNS}
            row["start"] = "" if utterance.start is None else str(utterance.start)
            audio = Path(os.path.abspath(utterance.path))  # noqa: PTH100
            row["path"] = str(audio.relative_to(folder) if audio.is_relative_to(folder) else audio)
            for column, value in row.items():
                if _BAD_IN_FIELD.search(value):
                    raise SparqError(
                        f"utterance {utterance.id!r}: its {column} {value!r} has a tab or line break: remove it"
                    )
            file.write("\t".join(row[column] for column in COLUMNS) + "\n")


def _read_lines(path: Path) -> Iterator[str]:
    """Yield header and rows; empty lines at the end are left out."""
    empty = 0
    for line in read_lines(path, "manifest"):
        if line:
            yield from [""] * empty
            empty = 0
            yield line
        else:
            empty += 1


def _check_header(path: Path, columns: list[str]) -> list[str]:
    if len(columns) == 1:
        raise SparqError(
            f"{path}: the header {columns[0]!r} has a single column: separate the columns"
            f" ({', '.join(COLUMNS)}) by tabs"
        )
    for column in columns:
        if column not in COLUMNS:
            raise SparqError(f"{path}: unknown column {column!r}: {near_matches(column, COLUMNS)}")
        if columns.count(column) > 1:
            raise SparqError(f"{path}: column {column!r} occurs {columns.count(column)} times: keep one")
    for column in REQUIRED_COLUMNS:
        if column not in columns:
            raise SparqError(f"{path}: no column {column!r}: columns {', '.join(REQUIRED_COLUMNS)} are required")
    return columns


def _times(row: dict[str, str]) -> tuple[Segment | None, Seconds]:
    """Return the segment, if there is one, and the length that the row states."""
    seconds = _time(row, "seconds", "length") or 0.0
    start = _time(row, "start", "time")
    if start is None:
        return None, seconds
    if not seconds:
        raise SparqError(f"start {row['start']} without seconds: write how long the part is")
    return Segment(start=start, seconds=seconds), seconds


def _time(row: dict[str, str], column: str, kind: str) -> Seconds | None:
    raw = row.get(column, "")
    if not raw:
        return None
    try:
        value = float(raw)
    except ValueError as error:
        raise SparqError(f"{column} {raw!r} is not a number: write e.g. 3.25") from error
    if not (math.isfinite(value) and value >= 0):
        raise SparqError(f"{column} {raw!r} is not a {kind}: write a number that is not negative")
    return value + 0.0  # no negative zero
