"""The formats that corpora come in, by name."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.fairseq import fairseq_lists, read_fairseq
from sparq.audio.corpora.huggingface import huggingface_lists, read_huggingface
from sparq.audio.corpora.kaldi import kaldi_lists, read_kaldi
from sparq.audio.corpora.lhotse import lhotse_lists, read_lhotse
from sparq.audio.corpora.librilight import read_librilight
from sparq.audio.corpora.librispeech import read_librispeech
from sparq.audio.corpora.libritts import read_libritts
from sparq.audio.corpora.ljspeech import ljspeech_lists, read_ljspeech
from sparq.audio.corpora.mls import mls_lists, read_mls
from sparq.audio.corpora.vctk import read_vctk
from sparq.audio.manifest import Row, scan_manifest
from sparq.errors import SparqError, unknown


def _no_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:  # noqa: ARG001
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a format is read.

    Attributes:
        read: from its folder and the names of subsets (none for all) to a stream of rows.
        lists: the files that list its recordings, whose content decides what is read; none for trees of
            folders, whose content is taken as published.
    """

    read: Callable[[Path, Sequence[str]], Iterator[Row]]
    lists: Callable[[Path, Sequence[str]], list[Path]] = _no_lists


def _manifest_lists(path: Path, subsets: Sequence[str]) -> list[Path]:
    if subsets:
        raise SparqError(f"{path}: a manifest has no subsets: leave {subsets[0]!r} out")
    return [path]


def _read_manifest(path: Path, subsets: Sequence[str]) -> Iterator[Row]:
    (manifest,) = _manifest_lists(path, subsets)
    return scan_manifest(manifest)


FORMATS = {
    "manifest": Format(read=_read_manifest, lists=_manifest_lists),
    "librispeech": Format(read=read_librispeech),
    "librilight": Format(read=read_librilight),
    "mls": Format(read=read_mls, lists=mls_lists),
    "libritts": Format(read=read_libritts),
    "vctk": Format(read=read_vctk),
    "ljspeech": Format(read=read_ljspeech, lists=ljspeech_lists),
    "kaldi": Format(read=read_kaldi, lists=kaldi_lists),
    "fairseq": Format(read=read_fairseq, lists=fairseq_lists),
    "lhotse": Format(read=read_lhotse, lists=lhotse_lists),
    "huggingface": Format(read=read_huggingface, lists=huggingface_lists),
}


def read_corpus(format_: str, path: Path, subsets: Sequence[str] = ()) -> Iterator[Row]:
    """Stream the rows of a corpus: utterances with their text normalized, and faults.

    Args:
        format_: a name in `FORMATS`.
        path: the corpus: a manifest, or a folder for every other format.
        subsets: names of the parts to read; all that are there if empty.

    Raises:
        SparqError: the format or a subset is unknown, the corpus is not there or not of that layout, or it
            has no rows.
    """
    if format_ not in FORMATS:
        raise unknown("format", format_, FORMATS)
    if format_ != "manifest" and not path.is_dir():
        raise SparqError(f"no such folder: {path}; name the folder of the {format_} corpus")
    empty = True
    for row in FORMATS[format_].read(path, subsets):
        empty = False
        yield row
    if empty:
        raise SparqError(f"{path} has no recordings of the format {format_}")


def corpus_lists(format_: str, path: Path, subsets: Sequence[str] = ()) -> list[Path]:
    """Return the files that list the recordings of a corpus; see `Format.lists`.

    Raises:
        SparqError: one of them is not there.
    """
    return FORMATS[format_].lists(path, subsets)
