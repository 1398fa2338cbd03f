"""Manifests: which recording is whose, and what is said in it, as tab separated text.

A manifest is UTF-8 text with a header line. Columns `id` and `path` are required; `speaker`, `split`,
`seconds`, `corpus` and `text` are optional, in any order. Audio paths are relative to the manifest's folder.
There is no quoting: a field holds neither tabs nor line breaks.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

from sparq.audio.text import normalize_text as normalize_text
from sparq.errors import SparqError, near_matches
from sparq.files import write_text
from sparq.types import Seconds

COLUMNS = ("id", "path", "speaker", "split", "seconds", "corpus", "text")
REQUIRED_COLUMNS = ("id", "path")

_SPLIT = re.compile(r"train|valid|test[\w.-]*")
_BAD_IN_NAME = re.compile(r"[\s/\\\x00-\x1f\x7f]")
_BAD_IN_FIELD = re.compile(r"[\t\r\n]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording.

    Attributes:
        id: unique in its manifest; no path separators, no white space.
        path: the sound file.
        speaker: who speaks, or "" if the manifest does not say. Unique within `corpus` only.
        split: `train`, `valid`, a name that starts with `test`, or "" if not assigned yet.
        seconds: length in seconds, or 0 if the manifest does not say.
        corpus: the collection it comes from, or "".
        text: what is said, normalized (`normalize_text`); "" makes it an utterance for speechlm only.
    """

    id: str
    path: Path
    speaker: str = ""
    split: str = ""
    seconds: Seconds = 0.0
    corpus: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """An utterance of a manifest that cannot be used, and why."""

    id: str
    path: Path
    reason: str


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
    for row in scan_manifest(path):
        if isinstance(row, Fault):
            raise SparqError(row.reason)
        if require_audio and not row.path.is_file():
            raise SparqError(
                f"{path}, utterance {row.id!r}: no such audio file: {row.path};"
                " audio paths are relative to the manifest's folder"
            )
        utterances.append(row)
    return utterances


def scan_manifest(path: str | Path) -> list[Utterance | Fault]:
    """Read a manifest; a row of unfit text or seconds becomes a `Fault`. Audio files are not looked at.

    Raises:
        SparqError: the manifest as a whole is unfit; see `read_manifest`.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))  # noqa: PTH100  (resolve() would follow links)
    lines = _read_lines(path)
    columns = _check_header(path, lines[0].split("\t"))
    first_line: dict[str, int] = {}
    rows: list[Utterance | Fault] = []
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise SparqError(
                f"{where} has {len(fields)} fields, the header has {len(columns)}: separate fields by single tabs"
            )
        row = dict(zip(columns, fields, strict=True))
        check_name(row["id"], f"{where}: id")
        if row["id"] in first_line:
            raise SparqError(
                f"{path}: duplicate id {row['id']!r} in lines {first_line[row['id']]} and {number}: ids must be unique"
            )
        first_line[row["id"]] = number
        if not row["path"]:
            raise SparqError(f"{where}, utterance {row['id']!r}: empty path: name its audio file")
        check_split(row.get("split", ""), where)
        try:
            rows.append(_parse(row, folder))
        except SparqError as error:
            reason = f"{where}, utterance {row['id']!r}: {error}"
            rows.append(Fault(id=row["id"], path=folder / row["path"], reason=reason))
    return rows


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
    other path is written absolute.

    Raises:
        SparqError: a field holds a tab or a line break, an id is unfit or occurs twice.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))  # noqa: PTH100
    seen: set[str] = set()
    lines = ["\t".join(COLUMNS)]
    for utterance in utterances:
        check_name(utterance.id, f"{path}: id")
        if utterance.id in seen:
            raise SparqError(f"{path}: duplicate id {utterance.id!r}: ids must be unique")
        seen.add(utterance.id)
        row = {field: str(getattr(utterance, field)) for field in COLUMNS}
        audio = Path(os.path.abspath(utterance.path))  # noqa: PTH100
        row["path"] = str(audio.relative_to(folder) if audio.is_relative_to(folder) else audio)
        for column, value in row.items():
            if _BAD_IN_FIELD.search(value):
                raise SparqError(
                    f"utterance {utterance.id!r}: its {column} {value!r} has a tab or line break: remove it"
                )
        lines.append("\t".join(row[column] for column in COLUMNS))
    write_text(path, "\n".join(lines) + "\n")


def _read_lines(path: Path) -> list[str]:
    """Return header and rows; only line feeds end a line, whatever Unicode thinks of others."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SparqError(f"no such manifest: {path}") from error
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise SparqError(
            f"{path} is not UTF-8: line {line} has the byte 0x{byte:02x}; save it as UTF-8 text"
        ) from error
    except OSError as error:
        raise SparqError(f"cannot read manifest {path}: {error.strerror}; name a tab separated file") from error
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    if len(lines) < 2:
        raise SparqError(f"{path} has no rows: after the header line, write a line for each utterance")
    return lines


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


def _parse(row: dict[str, str], folder: Path) -> Utterance:
    raw_seconds = row.get("seconds", "") or "0"
    try:
        seconds = float(raw_seconds)
    except ValueError as error:
        raise SparqError(f"seconds {raw_seconds!r} is not a number: write e.g. 3.25") from error
    if not (math.isfinite(seconds) and seconds >= 0):
        raise SparqError(f"seconds {raw_seconds!r} is not a length: write a number that is not negative")
    raw_text = row.get("text", "")
    text = normalize_text(raw_text)
    if raw_text.strip() and not text:
        raise SparqError(f"text {raw_text!r} has no letter or digit: write what is said, or leave it empty")
    return Utterance(
        id=row["id"],
        path=folder / row["path"],
        speaker=row.get("speaker", ""),
        split=row.get("split", ""),
        seconds=seconds + 0.0,  # no negative zero
        corpus=row.get("corpus", ""),
        text=text,
    )
