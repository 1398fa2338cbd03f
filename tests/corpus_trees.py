"""Helpers for small trees of corpora."""

import gzip
from pathlib import Path

import numpy as np
import soundfile

from sparq.audio.corpora import read_corpus
from sparq.audio.manifest import Fault, Utterance


def sound(path: Path, seconds: float = 0.3, rate: int = 16_000) -> Path:
    """Write noise of that length; the format follows from the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(len(path.name)).standard_normal(round(seconds * rate))
    if path.suffix == ".opus":
        soundfile.write(path, samples, rate, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, samples, rate)
    return path


def text(path: Path, *lines: str) -> Path:
    """Write lines of text, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(format_: str, folder: Path, *subsets: str) -> list[Utterance]:
    """Return the rows of a corpus without faults, whose recordings all are there."""
    rows = list(read_corpus(format_, folder, subsets))
    for row in rows:
        assert isinstance(row, Utterance), row
        assert row.path.is_file(), row.path
    return rows


def faults(format_: str, folder: Path, *subsets: str) -> list[str]:
    """Return why rows of a corpus are unfit; each is one line."""
    reasons = [row.reason for row in read_corpus(format_, folder, subsets) if isinstance(row, Fault)]
    assert not any("\n" in reason for reason in reasons)
    return reasons
