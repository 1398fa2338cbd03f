"""VCTK 0.92 (Yamagishi et al. 2019).

    VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_mic1.flac
    VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_mic2.flac
    VCTK-Corpus-0.92/txt/p225/p225_001.txt

Two microphones recorded the same sentences; p280 and p315 have the first only. The texts of p315 were lost, so that
speaker has no folder in `txt` and is read without text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import file_names, subfolders
from sparq.audio.manifest import Fault, Row, make_row
from sparq.errors import SparqError, near_matches
from sparq.files import read_lines

MICROPHONES = ("mic1", "mic2")
WITHOUT_TEXT = "p315"


def read_vctk(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances by speaker; one without a text file is a `Fault`, except of p315.

    Args:
        folder: the corpus.
        subsets: `mic1`, `mic2` or both; mic1 if none is named, because both are the same speech.

    Raises:
        SparqError: the folder has another layout, or a microphone is unknown.
    """
    for subset in subsets:
        if subset not in MICROPHONES:
            raise SparqError(f"{folder}: unknown subset {subset!r}: {near_matches(subset, MICROPHONES)}")
    audio = folder / "wav48_silence_trimmed"
    if not audio.is_dir():
        raise SparqError(f"{folder} has no wav48_silence_trimmed: expected the folder VCTK-Corpus-0.92")
    suffixes = tuple(f"_{microphone}.flac" for microphone in subsets or MICROPHONES[:1])
    for speaker in subfolders(audio):
        for name in file_names(audio / speaker, ".flac"):
            if name.endswith(suffixes):
                yield _utterance(folder, audio / speaker / name, speaker)


def _utterance(folder: Path, path: Path, speaker: str) -> Row:
    sentence = path.stem.rpartition("_")[0]
    file = folder / "txt" / speaker / f"{sentence}.txt"
    text = ""
    if speaker != WITHOUT_TEXT:
        try:
            text = " ".join(read_lines(file, "text"))
        except SparqError as error:
            return Fault(id=path.stem, path=path, reason=f"utterance {path.stem!r}: {error}")
    return make_row(str(file), id=path.stem, path=path, speaker=speaker, text=text)
