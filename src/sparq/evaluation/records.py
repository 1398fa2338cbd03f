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

_TYPES: dict[Any, Any] = {str: pa.string(), int: pa.int32()}
SCHEMA = pa.schema([pa.field(f.name, _TYPES[f.type], nullable=False) for f in dataclasses.fields(Transcript)])


def write_records(path: Path, transcripts: Sequence[Transcript]) -> None:
    """Write one row for each transcript, atomically."""
    table = pa.Table.from_pylist([dataclasses.asdict(t) for t in transcripts], schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_records(path: Path) -> list[Transcript]:
    """Return what `write_records` wrote.

    Raises:
        SparqError: the file is missing, damaged or of other columns.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise SparqError(f"{path} is not a file of transcripts: {str(error).splitlines()[0]}") from error
    if not table.schema.equals(SCHEMA):
        raise SparqError(f"{path} is not a file of transcripts: its columns are {', '.join(table.schema.names)}")
    return [Transcript(**row) for row in table.to_pylist()]
