"""Rows of any number of sources on disk, so that a corpus of any size takes the memory of none.

The rows lie in a temporary SQLite database (`sparq.files.temporary_database`). A row takes some 300 bytes there.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from sparq.audio.manifest import Fault, Row, Utterance
from sparq.files import temporary_database

_PAGE = 1000
_COLUMNS = "id, path, speaker, split, start, seconds, corpus, text, reason"
_TABLE = f"""
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, source INTEGER, name TEXT, {_COLUMNS.replace("id,", "id TEXT UNIQUE,", 1)}
);
CREATE INDEX speakers ON rows (source, speaker);
"""
_GOOD = "source = ? AND reason IS NULL"


class Spool:
    """The rows, in the order of their coming; a context manager.

    A row has the number of its source, a name, which is unique in its source, and an id, which is unique.
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._db = self._database.__enter__()
        self._db.create_function("rank", 3, rank, deterministic=True)
        self._db.executescript(_TABLE)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.__exit__(kind, error, trace)

    def add(self, source: int, row: Row, id_: str) -> tuple[int, Path] | None:
        """Append a row under an id; if another one has that id, append nothing and return its source and path."""
        values = _values(dataclasses.replace(row, id=id_))
        statement = f"INSERT OR IGNORE INTO rows (source, name, {_COLUMNS}) VALUES (?, ?, {', '.join('?' * 9)})"
        if self._db.execute(statement, (source, row.id, *values)).rowcount:
            return None
        other = self._db.execute("SELECT source, path FROM rows WHERE id = ?", (id_,)).fetchone()
        return other[0], Path(other[1])

    def replace(self, number: int, row: Row) -> None:
        """Put another row in the place of one; its id stays."""
        columns = _COLUMNS.replace("id, ", "", 1)
        statement = f"UPDATE rows SET ({columns}) = ({', '.join('?' * 8)}) WHERE number = ?"
        self._db.execute(statement, (*_values(row)[1:], number))

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield number and row of all rows, in order; rows may be replaced meanwhile."""
        last = 0
        while True:
            statement = f"SELECT number, {_COLUMNS} FROM rows WHERE number > ? ORDER BY number LIMIT {_PAGE}"
            page = self._db.execute(statement, (last,)).fetchall()
            if not page:
                return
            for number, *values in page:
                yield number, _row(values)
            last = page[-1][0]

    def utterances(self) -> Iterator[Utterance]:
        """Yield the rows that are no faults."""
        return (row for _, row in self.rows() if isinstance(row, Utterance))

    def faults(self) -> Iterator[Fault]:
        """Yield the rows that are faults."""
        return (row for _, row in self.rows() if isinstance(row, Fault))

    def __len__(self) -> int:
        return self._number("SELECT COUNT(*) FROM rows")

    def count(self, source: int, where: str = "1") -> int:
        """Return how many utterances of a source there are for which an SQL condition holds."""
        return self._number(f"SELECT COUNT(*) FROM rows WHERE {_GOOD} AND {where}", source)

    def first(self, source: int, where: str) -> str | None:
        """Return the name of the first utterance of a source for which an SQL condition holds."""
        statement = f"SELECT name FROM rows WHERE {_GOOD} AND {where} ORDER BY number LIMIT 1"
        found = self._db.execute(statement, (source,)).fetchone()
        return None if found is None else str(found[0])

    def speakers(self, source: int) -> dict[str, int]:
        """Return how many utterances each speaker of a source has."""
        return dict(
            self._db.execute(f"SELECT speaker, COUNT(*) FROM rows WHERE {_GOOD} GROUP BY speaker", (source,)).fetchall()
        )

    def set_speaker_split(self, source: int, speaker: str, split: str) -> None:
        """Give all utterances of a speaker to a split."""
        self._db.execute(f"UPDATE rows SET split = ? WHERE {_GOOD} AND speaker = ?", (split, source, speaker))

    def set_split(self, source: int, split: str, *, kind: str = "", seed: int = 0, most: int = -1) -> None:
        """Give utterances that have no split to one, in the order of `rank` of their names.

        Args:
            source: number of the source.
            split: name of the split.
            kind: what is drawn.
            seed: of the draw.
            most: how many; -1 for all.
        """
        order = "ORDER BY rank(?, ?, name) LIMIT ?" if most >= 0 else ""
        chosen = f"SELECT number FROM rows WHERE {_GOOD} AND split = '' {order}"
        values = (split, source, seed, kind, most) if order else (split, source)
        self._db.execute(f"UPDATE rows SET split = ? WHERE number IN ({chosen})", values)

    def _number(self, statement: str, *values: Any) -> int:
        return int(self._db.execute(statement, values).fetchone()[0])


def rank(seed: int, kind: str, name: str) -> bytes:
    """Return the place of a name in a draw: SHA-256 of seed, kind and name."""
    return hashlib.sha256(f"{seed}\t{kind}\t{name}".encode()).digest()


def _values(row: Row) -> tuple[Any, ...]:
    if isinstance(row, Fault):
        return row.id, str(row.path), "", "", None, 0.0, "", "", row.reason
    return row.id, str(row.path), row.speaker, row.split, row.start, row.seconds, row.corpus, row.text, None


def _row(values: list[Any]) -> Row:
    id_, path, speaker, split, start, seconds, corpus, text, reason = values
    if reason is not None:
        return Fault(id=id_, path=Path(path), reason=reason)
    return Utterance(
        id=id_, path=Path(path), speaker=speaker, split=split, start=start, seconds=seconds, corpus=corpus, text=text
    )
