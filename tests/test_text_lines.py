"""Text files as streams: all lines or a uniform sample, in constant memory."""

import gzip
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparq.data.text_lines import read_texts, sample
from sparq.errors import SparqError


def _write(path: Path, lines: list[str]) -> Path:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["lm.txt", "librispeech-lm-norm.txt.gz"])
def test_lines_are_normalized(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, ["A TALE OF TWO", "", "IT'S  ODD", "--", "LAST"])
    assert list(read_texts(path)) == ["a tale of two", "it's odd", "last"]
    assert list(read_texts(path, most=9)) == ["a tale of two", "it's odd", "last"]


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 5))
def test_a_sample_is_a_sorted_part(total: int, most: int, seed: int) -> None:
    items = [(i, str(i)) for i in range(total)]
    chosen = sample(iter(items), most, seed=seed)
    assert len(chosen) == min(total, most)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(items)
    assert chosen == sample(items, most, seed=seed)


def test_every_line_is_as_likely() -> None:
    items = [(i, "") for i in range(40)]
    counts = Counter(number for seed in range(4000) for number, _ in sample(items, 5, seed=seed))
    # Each is drawn 500 times on average, with a standard deviation of 21.
    assert all(abs(counts[i] - 500) < 5 * 21 for i in range(40))


def test_a_sample_holds_itself_only(tmp_path: Path) -> None:
    path = _write(tmp_path / "lm.txt.gz", [f"LINE NUMBER {i} SAYS SOMETHING OF ITS OWN" for i in range(20_000)])
    tracemalloc.start()
    assert len(list(read_texts(path, most=20))) == 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000, "the lines alone are 0.9 MB"


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=r"lm.txt, line 2: text has 'п'"):
        list(read_texts(_write(tmp_path / "lm.txt", ["fine", "привет"])))
    with pytest.raises(SparqError, match=r"no such text file: .*none.txt"):
        list(read_texts(tmp_path / "none.txt"))
    (tmp_path / "plain.txt.gz").write_text("not gzip")
    with pytest.raises(SparqError, match=r"cannot read text file .*plain.txt.gz after line 0: Not a gzipped file"):
        list(read_texts(tmp_path / "plain.txt.gz"))
