"""Text alone in parts: of text files of any length, the lines that each epoch shows."""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sparq.data.text_lines import read_texts
from sparq.errors import SparqError
from sparq.progress import progress


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """What of a text file is shown.

    Attributes:
        path: the file.
        first: number of its first line in the database.
        num_lines: its lines, but for empty and held-out ones.
        num_held_out: lines that are held-out transcripts.
        num_shown: lines that an epoch shows.
        characters: what its lines are written in.
    """

    path: Path
    first: int
    num_lines: int
    num_held_out: int
    num_shown: int
    characters: frozenset[str]


class TextLines:
    """The lines of text files, normalized, of which each epoch shows other ones.

    They are read once, into a database, and memory holds what one epoch shows: of each file a part that is spread over
    all of it, see `part_of_epoch`.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        files: Sequence[Path],
        *,
        most: int = 0,
        seed: int = 0,
        held_out: Collection[str] = (),
    ) -> None:
        """Read the files.

        Args:
            database: an empty one.
            files: UTF-8 text, a sentence a line; gzip if a name ends with `.gz`. One that is named twice counts as two.
            most: lines of each file that an epoch shows; 0 for all.
            seed: of which lines come first.
            held_out: normalized texts that are not shown.

        Raises:
            SparqError: a file is missing or damaged, has a line in another script, or has no line to show.
        """
        self._database, self._seed = database, seed
        database.execute("CREATE TABLE lines (number INTEGER PRIMARY KEY, text TEXT)")
        found: list[TextFile] = []
        for file in files:
            found.append(self._read(file, sum(other.num_lines for other in found), most, held_out))
        self.files = tuple(found)

    def _read(self, file: Path, first: int, most: int, held_out: Collection[str]) -> TextFile:
        number, left_out = first, 0
        characters: set[str] = set()

        def rows() -> Iterator[tuple[int, str]]:
            nonlocal number, left_out
            with progress(f"read {file.name}", unit="line", unit_scale=True) as bar:
                for text in read_texts(file):
                    bar.update()
                    if text in held_out:
                        left_out += 1
                    else:
                        characters.update(text)
                        yield number, text
                        number += 1

        self._database.executemany("INSERT INTO lines VALUES (?, ?)", rows())
        num_lines = number - first
        if not num_lines:
            reason = f"all {left_out:,} are held-out transcripts" if left_out else "it is empty"
            raise SparqError(f"{file} has no line to train on, {reason}: expected a sentence a line")
        return TextFile(
            path=file,
            first=first,
            num_lines=num_lines,
            num_held_out=left_out,
            num_shown=min(most or num_lines, num_lines),
            characters=frozenset(characters),
        )

    def epoch(self, epoch: int) -> list[str]:
        """Return what an epoch shows of all files; epochs count from 0."""
        texts: list[str] = []
        for index, file in enumerate(self.files):
            numbers = part_of_epoch(file.num_lines, file.num_shown, epoch=epoch, seed=[self._seed, index])
            for number in numbers.tolist():
                found = self._database.execute("SELECT text FROM lines WHERE number = ?", (file.first + number,))
                texts += found.fetchone()
        return texts

    def longer_than(self, length: int) -> Iterator[tuple[Path, str]]:
        """Yield the lines of more characters than that, each with its file."""
        found = self._database.execute("SELECT number, text FROM lines WHERE length(text) > ?", (length,))
        for number, text in found:
            yield next(file.path for file in reversed(self.files) if file.first <= number), text


def part_of_epoch(total: int, count: int, *, epoch: int, seed: Sequence[int]) -> Int64[np.ndarray, "count"]:
    """Return one number of each of `count` equal stretches of the numbers below `total`, in order.

        b_i = floor(i total / count),    number i = b_i + (o_i + epoch) mod (b_{i + 1} - b_i)

    with random o_i. All come in ceil(total / count) epochs, and none again before its whole stretch was there.

    Args:
        total: how many numbers there are.
        count: how many belong to an epoch, at most all.
        epoch: from 0.
        seed: of the o_i.
    """
    bounds = np.arange(count + 1) * total // count
    sizes = np.diff(bounds)
    offsets = np.random.default_rng(seed).integers(sizes)
    return bounds[:-1] + (offsets + epoch) % sizes
