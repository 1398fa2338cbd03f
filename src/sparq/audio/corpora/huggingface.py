"""Audio folders of Hugging Face `datasets`: sound files with a metadata file beside them.

    train/metadata.csv      a header with file_name, then e.g. speaker_id,transcription (or metadata.jsonl)
    train/0001.wav          file_name is relative to the metadata file
    validation/metadata.csv ...

or one metadata file for all, with file names such as train/0001.wav; all of it may lie in a folder `data`. The first of
`TEXTS` and of `SPEAKERS` that is a column is read. Data sets with the audio inside of Parquet or Arrow files are
refused; the message says how to turn them into such a folder.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sparq.audio.corpora.folders import split_of, subfolders
from sparq.audio.manifest import Row, make_row
from sparq.errors import SparqError, near_matches
from sparq.files import read_lines

TEXTS = ("text", "transcription", "transcript", "sentence", "normalized_text")
SPEAKERS = ("speaker_id", "speaker", "client_id")

_METADATA = ("metadata.csv", "metadata.jsonl")


def huggingface_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the metadata files to read.

    Args:
        folder: the audio folder.
        subsets: names of folders in it, or in its folder `data`; all with metadata if empty.

    Raises:
        SparqError: there are none.
    """
    if not folder.is_dir():
        raise SparqError(f"no such folder: {folder}")
    for root in (folder, folder / "data"):
        found = {name: file for name in subfolders(root) if (file := _metadata(root / name))} if root.is_dir() else {}
        if found or _metadata(root):
            break
    for subset in subsets:
        if subset not in found:
            raise SparqError(f"{folder} has no {subset}/metadata.csv: {near_matches(subset, found)}")
    if subsets or found:
        return [found[name] for name in subsets or found]
    single = _metadata(root)
    if single is None:
        inside = next((file for suffix in ("parquet", "arrow") for file in sorted(folder.rglob(f"*.{suffix}"))), None)
        if inside is not None:
            raise SparqError(
                f"{inside} holds its audio inside: write each `audio.bytes` to a file and list them in a metadata.csv"
                " with the columns file_name and transcription"
            )
        raise SparqError(f"{folder} has no metadata.csv or metadata.jsonl: expected an audio folder of `datasets`")
    return [single]


def read_huggingface(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the rows of the metadata; folders named train, validation and test give them a split.

    Raises:
        SparqError: there is no metadata, it lacks `file_name`, or a line is malformed.
    """
    for metadata in huggingface_lists(folder, subsets):
        prefix = tuple(part for part in metadata.parent.relative_to(folder).parts if part != "data")
        for where, record in _csv(metadata) if metadata.suffix == ".csv" else _jsonl(metadata):
            name = record.get("file_name")
            if not isinstance(name, str) or not name:
                raise SparqError(f"{where} has no file_name: name the sound file, relative to {metadata.parent}")
            place = PurePosixPath(*prefix, name)
            yield make_row(
                where,
                id="-".join(place.with_suffix("").parts).replace(" ", "_"),
                path=metadata.parent / name,
                speaker=_first(record, SPEAKERS),
                split=split_of(place.parts[0]) if len(place.parts) > 1 else "",
                text=_first(record, TEXTS),
            )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # The lines keep their ends, because a quoted field may hold a line break.
    reader = csv.DictReader((line + "\n" for line in read_lines(path, "metadata")), strict=True)
    try:
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record or None in record.values():
                raise SparqError(f"{where} has not as many fields as the header: {', '.join(reader.fieldnames or ())}")
            yield where, record
    except csv.Error as error:
        raise SparqError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_lines(path, "metadata"), start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SparqError(f"{where} is not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise SparqError(f"{where} is no JSON object: expected file_name and the other columns")
        yield where, record


def _first(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    value = next((record[column] for column in columns if column in record), None)
    return "" if value is None else str(value)
