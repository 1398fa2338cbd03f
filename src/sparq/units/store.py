"""The files of units: one Parquet file per shard, and a summary that says which shards there should be."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt16

from sparq.errors import SparqError, unknown
from sparq.files import atomic_path, read_json
from sparq.types import Seconds

SUMMARY = "units.json"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("speaker", pa.string(), nullable=False),
        pa.field("corpus", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("units", pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False),
        pa.field("durations", pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False),
    ]
)
_METADATA_KEY = b"sparq"


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitUtterance:
    """An utterance as units.

    Attributes:
        id: as in the manifest.
        speaker: as in the manifest.
        corpus: as in the manifest.
        text: as in the manifest; may be empty.
        seconds: length of the audio.
        units: the units; without repetition if the run de-duplicates.
        durations: how many frames each unit lasts; all 1 if the run keeps repetitions.
    """

    id: str
    speaker: str
    corpus: str
    text: str
    seconds: Seconds
    units: UInt16[np.ndarray, "units"]
    durations: UInt16[np.ndarray, "units"]


def shard_path(folder: Path, split: str, index: int) -> Path:
    """Return the path of a shard."""
    return folder / split / f"{index:05d}.parquet"


def write_shard(path: Path, rows: Sequence[UnitUtterance], metadata: Mapping[str, Any]) -> None:
    """Write a shard atomically; the same rows and metadata give the same bytes."""
    header = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    table = pa.table(columns, schema=SCHEMA.with_metadata({_METADATA_KEY: header}))
    with atomic_path(path) as temporary:
        pq.write_table(
            table, temporary, version="2.6", compression="zstd", compression_level=3, use_dictionary=False,
            write_statistics=False, row_group_size=len(rows) or 1,
        )  # fmt: skip


def read_shard_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a shard.

    Raises:
        SparqError: the file is not a shard of units.
    """
    try:
        schema = pq.read_schema(path)
        metadata = json.loads((schema.metadata or {}).get(_METADATA_KEY, b"null"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SparqError(f"{path} is not a shard of units: {str(error).splitlines()[0]}") from error
    if not isinstance(metadata, dict) or schema.names != SCHEMA.names:
        raise SparqError(f"{path} is not a shard of units: its columns are {', '.join(schema.names)}")
    return metadata


def read_summary(folder: Path) -> dict[str, Any]:
    """Return `folder`/units.json, which is written when every split is encoded.

    Raises:
        SparqError: it is missing or broken.
    """
    path = folder / SUMMARY
    if not path.exists():
        raise SparqError(f"no finished units in {folder}: run `sparq units` first")
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("splits"), dict):
        raise SparqError(f"{path} is not a summary of units: expected the key 'splits'")
    return summary


def read_units(folder: Path, split: str, *, expect_fingerprint: str | None = None) -> Iterator[UnitUtterance]:
    """Stream the utterances of a split in manifest order, one shard in memory at a time.

    Faults are found before the first utterance is returned, except damage inside a shard.

    Args:
        folder: where units live, `RUN/units`.
        split: name of the split.
        expect_fingerprint: fingerprint of the k-means that the units must come from.

    Raises:
        SparqError: unfinished encoding, no such split, a missing or broken shard, or units of another
            k-means.
    """
    summary = read_summary(folder)
    if split not in summary["splits"]:
        raise unknown("split", split, summary["splits"])
    if expect_fingerprint is not None and summary["kmeans"] != expect_fingerprint:
        raise SparqError(
            f"the units in {folder} come from k-means {summary['kmeans']}, but {expect_fingerprint} is "
            "expected: use the run folder that belongs to it"
        )
    paths = [shard_path(folder, split, i) for i in range(summary["splits"][split]["shards"])]
    for path in paths:
        if not path.exists():
            raise SparqError(f"shard {path} is missing: run `sparq units` again")
        found = read_shard_metadata(path).get("kmeans")
        if found != summary["kmeans"]:
            raise SparqError(f"shard {path} comes from k-means {found}, but the others from {summary['kmeans']}")
    return _stream(paths)


def _stream(paths: Sequence[Path]) -> Iterator[UnitUtterance]:
    for path in paths:
        yield from read_shard(path)


def read_shard(path: Path) -> list[UnitUtterance]:
    """Return the utterances of one shard.

    Raises:
        SparqError: the file is damaged.
    """
    try:
        # `partitioning=None`: a folder named "a=b" is no column.
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise SparqError(f"{path} is not a shard of units: {str(error).splitlines()[0]}") from error
    units, durations = (_arrays(table[name]) for name in ("units", "durations"))
    scalars = (table[name].to_pylist() for name in ("id", "speaker", "corpus", "text", "seconds"))
    return [
        UnitUtterance(id=i, speaker=s, corpus=c, text=t, seconds=n, units=u, durations=d)
        for i, s, c, t, n, u, d in zip(*scalars, units, durations, strict=True)
    ]


def _arrays(column: pa.ChunkedArray) -> list[UInt16[np.ndarray, "_units"]]:
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy()
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
