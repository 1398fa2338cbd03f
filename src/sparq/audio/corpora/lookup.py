"""A table from names to values on disk, for lists that no order joins."""

import sqlite3
from collections.abc import Iterable
from types import TracebackType

from sparq.errors import SparqError


class Lookup:
    """Values by name in a temporary SQLite database; a context manager. Memory does not grow with the table."""

    def __init__(self, entries: Iterable[tuple[str, str]], what: str) -> None:
        """Fill the table.

        Args:
            entries: names and values.
            what: the file that they come from, for messages.

        Raises:
            SparqError: a name comes twice.
        """
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE entries (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        for name, value in entries:
            if not self._db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?)", (name, value)).rowcount:
                self._db.close()
                raise SparqError(f"{what} has {name!r} twice: keep one")

    def __enter__(self) -> "Lookup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def get(self, name: str) -> str | None:
        """Return the value of a name, or None."""
        found = self._db.execute("SELECT value FROM entries WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])
