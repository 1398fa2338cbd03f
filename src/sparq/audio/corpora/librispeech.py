"""LibriSpeech (Panayotov et al. 2015), OpenSLR 12.

    LibriSpeech/train-clean-100/19/198/19-198-0000.flac
    LibriSpeech/train-clean-100/19/198/19-198.trans.txt      a line each: 19-198-0000 NORTHANGER ABBEY

Folders are speaker and chapter; the text is upper case without punctuation.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import choose_subsets, file_names, split_of, subfolders
from sparq.audio.manifest import Fault, Row, make_row
from sparq.errors import SparqError
from sparq.files import read_lines

SUBSETS = (
    "train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other",
)  # fmt: skip


def read_librispeech(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances, by subset, speaker and chapter; a chapter is in memory at a time.

    A recording without a line in its chapter's transcript, or a line without a recording, is a `Fault`.

    Raises:
        SparqError: the folder does not hold the subsets, or a transcript is missing or malformed.
    """
    looks_like = "LibriSpeech/train-clean-100/19/198/19-198.trans.txt"
    for subset in choose_subsets(folder, subsets, SUBSETS, looks_like):
        for speaker in subfolders(folder / subset):
            for chapter in subfolders(folder / subset / speaker):
                yield from _chapter(folder / subset / speaker / chapter, speaker, chapter, split_of(subset))


def _chapter(folder: Path, speaker: str, chapter: str, split: str) -> Iterator[Row]:
    transcript = folder / f"{speaker}-{chapter}.trans.txt"
    texts: dict[str, str] = {}
    for number, line in enumerate(read_lines(transcript, "transcript"), start=1):
        id_, space, text = line.partition(" ")
        if not space or id_ in texts:
            raise SparqError(f"{transcript}, line {number} is {line!r}: expected a new id, a space and a text")
        texts[id_] = text
    ids = [name.removesuffix(".flac") for name in file_names(folder, ".flac")]
    for id_ in sorted({*ids, *texts}):
        path = folder / f"{id_}.flac"
        if id_ not in texts:
            yield Fault(id=id_, path=path, reason=f"{transcript} has no line for {path.name}: copy the chapter again")
        else:
            yield make_row(str(transcript), id=id_, path=path, speaker=speaker, split=split, text=texts[id_])
