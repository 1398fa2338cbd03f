"""Lines of text files that epochs show: each in its turn, the same for every reader, on disk."""

import gzip
import sqlite3
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparq.data.text_epochs import TextLines, part_of_epoch
from sparq.errors import SparqError
from sparq.files import temporary_database

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LINES = [f"{WORDS[i // 10]} {WORDS[i % 10]}" for i in range(37)]


def _write(path: Path, lines: list[str]) -> Path:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def read() -> Iterator[Callable[..., TextLines]]:
    databases = []

    def open_files(*files: Path, **options: object) -> TextLines:
        databases.append(temporary_database())
        return TextLines(databases[-1].__enter__(), files, **options)  # type: ignore[arg-type]

    yield open_files
    for database in databases:
        database.__exit__(None, None, None)


@given(total=st.integers(1, 300), data=st.data(), seed=st.integers(0, 9))
def test_every_number_comes_in_its_turn(total: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, total))
    parts = [part_of_epoch(total, count, epoch=epoch, seed=[seed]) for epoch in range(-(-total // count))]
    times = Counter(int(number) for part in parts for number in part)
    # All are there after so many epochs, and one less often than the others fit is there twice.
    assert set(times) == set(range(total))
    assert max(times.values()) <= 2
    whole = Counter(int(number) for part in parts[: total // count] for number in part)
    assert max(whole.values()) == 1
    for part in parts:
        assert len(part) == count
        # Spread over the whole: an even part has gaps of total / count.
        assert (np.diff(part) <= 2 * total / count).all()
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("most", [0, 5, 37, 99])
def test_an_epoch_shows_so_many_lines(tmp_path: Path, read: Callable[..., TextLines], most: int) -> None:
    lines = read(_write(tmp_path / "a.txt", [line.upper() + "." for line in LINES]), most=most)
    shown = most if 0 < most < 37 else 37
    assert (lines.files[0].num_lines, lines.files[0].num_shown) == (37, shown)
    for epoch in range(3):
        assert len(lines.epoch(epoch)) == shown
        assert set(lines.epoch(epoch)) <= set(LINES)
    assert (lines.epoch(0) == lines.epoch(1)) == (shown == 37)


def test_plain_and_gzip_and_every_reader_show_the_same(tmp_path: Path, read: Callable[..., TextLines]) -> None:
    plain, packed = _write(tmp_path / "a.txt", LINES), _write(tmp_path / "a.txt.gz", LINES)
    readers = [read(file, most=5, seed=3) for file in (plain, plain, packed)]
    # In any order, and as often as asked.
    epochs = [
        [reader.epoch(epoch) for epoch in order]
        for reader, order in zip(readers, ([0, 1, 2], [2, 1, 0, 2], [0, 2]), strict=True)
    ]
    assert epochs[1] == [epochs[0][2], epochs[0][1], epochs[0][0], epochs[0][2]]
    assert epochs[2] == [epochs[0][0], epochs[0][2]]
    assert read(plain, most=5, seed=4).epoch(0) != epochs[0][0]


def test_several_files(tmp_path: Path, read: Callable[..., TextLines]) -> None:
    a, b = _write(tmp_path / "a.txt", LINES), _write(tmp_path / "b.txt", ["red lamp", "", "green door"])
    lines = read(a, b, a, most=3)
    assert [file.num_shown for file in lines.files] == [3, 2, 3]
    assert sorted(lines.epoch(0)[3:5]) == ["green door", "red lamp"]
    # A file named twice counts as two, which begin at other lines.
    assert lines.epoch(0)[:3] != lines.epoch(0)[5:]
    assert set(lines.epoch(0)[5:]) <= set(LINES)
    assert sorted(lines.longer_than(10)) == sorted([(a, line) for line in LINES if len(line) > 10] * 2)
    assert (b, "green door") in list(lines.longer_than(9))


def test_held_out_texts_are_never_shown(tmp_path: Path, read: Callable[..., TextLines]) -> None:
    file = _write(tmp_path / "a.txt", [*LINES, "One, two!", "ONE TWO", "one two three"])
    lines = read(file, held_out={"one two", "three three", "nowhere"})
    assert (lines.files[0].num_lines, lines.files[0].num_held_out) == (36, 4)
    assert sorted(lines.epoch(0)) == sorted({*LINES, "one two three"} - {"one two", "three three"})


def test_memory_holds_what_an_epoch_shows(tmp_path: Path, read: Callable[..., TextLines]) -> None:
    """Python's own memory; that of SQLite is its cache, 2 MB."""
    file = _write(tmp_path / "lm.txt.gz", [f"LINE NUMBER {i} SAYS SOMETHING OF ITS OWN" for i in range(20_000)])
    tracemalloc.start()
    assert len(read(file, most=20).epoch(7)) == 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000, "the lines alone are 0.9 MB"


def test_faults(tmp_path: Path, read: Callable[..., TextLines]) -> None:
    with pytest.raises(SparqError, match=r"no such text file: .*none.txt"):
        read(tmp_path / "none.txt")
    with pytest.raises(SparqError, match=r"a.txt has no line to train on, it is empty: expected a sentence a line"):
        read(_write(tmp_path / "a.txt", ["", " -- "]))
    with pytest.raises(SparqError, match=r"no line to train on, all 2 are held-out transcripts"):
        read(_write(tmp_path / "a.txt", ["red lamp", "Red lamp."]), held_out={"red lamp"})
    with pytest.raises(SparqError, match=r"a.txt, line 2: text has 'п'"):
        read(_write(tmp_path / "a.txt", ["fine", "привет"]))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.txt", [f"line {i}" for i in range(5000)])

    def fill() -> None:
        with temporary_database() as database:
            database.execute("PRAGMA max_page_count = 10")
            TextLines(database, [file])

    with pytest.raises(SparqError, match="no space left on the disk for temporary files"):
        fill()
    with pytest.raises(sqlite3.OperationalError, match="no such table"), temporary_database() as database:
        database.execute("SELECT * FROM nowhere")
