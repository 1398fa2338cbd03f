"""LibriTTS (Zen et al. 2019), OpenSLR 60, and LibriTTS-R, OpenSLR 141, of the same layout.

    LibriTTS/train-clean-100/103/1241/103_1241_000000_000001.wav
    LibriTTS/train-clean-100/103/1241/103_1241_000000_000001.normalized.txt
    LibriTTS/train-clean-100/103/1241/103_1241_000000_000001.original.txt

Folders are speaker and chapter. The normalized text is read: it has numbers and abbreviations as words.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import choose_subsets, file_names, split_of, subfolders
from sparq.audio.corpora.librispeech import SUBSETS
from sparq.audio.manifest import Fault, Row, make_row
from sparq.errors import SparqError
from sparq.files import read_lines


def read_libritts(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances, by subset, speaker and chapter; one without a text file is a `Fault`.

    Raises:
        SparqError: the folder does not hold the subsets.
    """
    looks_like = "LibriTTS/train-clean-100/103/1241/103_1241_000000_000001.normalized.txt"
    for subset in choose_subsets(folder, subsets, SUBSETS, looks_like):
        for speaker in subfolders(folder / subset):
            for chapter in subfolders(folder / subset / speaker):
                place = folder / subset / speaker / chapter
                for name in file_names(place, ".wav"):
                    yield _utterance(place / name, speaker, split_of(subset))


def _utterance(path: Path, speaker: str, split: str) -> Row:
    file = path.with_suffix(".normalized.txt")
    try:
        text = " ".join(read_lines(file, "normalized text"))
    except SparqError as error:
        return Fault(id=path.stem, path=path, reason=f"utterance {path.stem!r}: {error}")
    return make_row(str(file), id=path.stem, path=path, speaker=speaker, split=split, text=text)
