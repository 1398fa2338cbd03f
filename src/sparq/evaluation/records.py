"""What was heard in each utterance, as a Parquet file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparq.errors import SparqError
from sparq.evaluation.recognition import Transcript
from sparq.files import atomic_path

_TYPES: dict[Any, tuple[Any, bool]] = {
    str: (pa.string(), False),
    int: (pa.int32(), False),
    float | None: (pa.float64(), True),
}
"""The column of each type of field, and whether it may be empty."""


def write_records(path: Path, transcripts: Sequence[Transcript]) -> None:
    """Write one row for each transcript, all of one class, atomically."""
    schema = _schema(type(transcripts[0]) if transcripts else Transcript)
    table = pa.Table.from_pylist([dataclasses.asdict(t) for t in transcripts], schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_records(path: Path) -> list[Transcript]:
    """Return the transcripts that `write_records` wrote.

    Raises:
        SparqError: the file is missing, damaged or of other columns.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise SparqError(f"{path} is not a file of transcripts: {str(error).splitlines()[0]}") from error
    if not table.schema.equals(_schema(Transcript)):
        raise SparqError(f"{path} is not a file of transcripts: its columns are {', '.join(table.schema.names)}")
    return [Transcript(**row) for row in table.to_pylist()]


def _schema(kind: type[Transcript]) -> pa.Schema:
    columns = [(field.name, *_TYPES[field.type]) for field in dataclasses.fields(kind)]
    return pa.schema([pa.field(name, column, nullable=empty) for name, column, empty in columns])
