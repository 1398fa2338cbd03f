"""Manifests of fairseq's speech models.

    train.tsv       first line: the audio's root folder; then a line each: 84/121123/84-121123-0000.flac TAB frames
    train.wrd       the texts, line by line (optional)
    train.ltr       the same as letters: H E L L O | W O R L D |  (read if there is no train.wrd)

Frames are samples at 16 kHz, as fairseq's models demand; a recording of another length is refused when it is checked.
A root that is not absolute starts at the folder of the list. An id is the path with `-` for `/`, without its suffix.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from sparq.audio.corpora.folders import file_names, split_of
from sparq.audio.manifest import Row, make_row
from sparq.errors import SparqError, near_matches
from sparq.files import read_lines
from sparq.types import SAMPLE_RATE


def fairseq_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the files that list what is read: for each subset its TSV, and its texts if there are any."""
    lists = []
    for name in _names(folder, subsets):
        texts = _texts(folder, name)
        lists += [folder / f"{name}.tsv", *([texts] if texts else [])]
    return lists


def read_fairseq(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances list by list; `train`, `valid`, `dev...` and `test...` give them a split.

    Args:
        folder: holds the lists.
        subsets: names of lists without `.tsv`; all if empty.

    Raises:
        SparqError: no list is there, a line is malformed, or list and texts have not as many lines.
    """
    for name in _names(folder, subsets):
        yield from _list(folder, name)


def _names(folder: Path, subsets: Sequence[str]) -> list[str]:
    found = [name.removesuffix(".tsv") for name in file_names(folder, ".tsv")] if folder.is_dir() else []
    if not found:
        raise SparqError(f"{folder} holds no .tsv: expected fairseq's train.tsv")
    for subset in subsets:
        if subset not in found:
            raise SparqError(f"{folder} has no {subset}.tsv: {near_matches(subset, found)}")
    return list(subsets) or found


def _texts(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}.wrd", folder / f"{name}.ltr")
    return next((file for file in files if file.exists()), None)


def _list(folder: Path, name: str) -> Iterator[Row]:
    tsv, texts = folder / f"{name}.tsv", _texts(folder, name)
    lines = read_lines(tsv, "fairseq list")
    root = folder / next(lines, "")
    spoken = read_lines(texts, "texts") if texts else itertools.repeat("")
    for number, line in enumerate(lines, start=2):
        where = f"{tsv}, line {number}"
        path, tab, frames = line.partition("\t")
        if not tab or not (frames.isascii() and frames.isdigit()):
            raise SparqError(f"{where} is {line!r}: expected a path below {root}, a tab and a number of frames")
        text = next(spoken, None)
        if text is None:
            raise SparqError(f"{texts} has {number - 2} lines, fewer than {tsv}: each needs one for each recording")
        if texts and texts.suffix == ".ltr":
            text = text.replace(" ", "").replace("|", " ")
        yield make_row(
            where, id="-".join(PurePosixPath(path).with_suffix("").parts), path=root / path, split=split_of(name),
            seconds=int(frames) / SAMPLE_RATE, text=text,
        )  # fmt: skip
    if texts and next(spoken, None) is not None:
        raise SparqError(f"{texts} has more lines than {tsv} has recordings: each needs one")
