"""LJSpeech 1.1 (Ito and Johnson 2017).

    LJSpeech-1.1/metadata.csv           a line each: LJ001-0001|as printed|as spoken
    LJSpeech-1.1/wavs/LJ001-0001.wav

One reader. Fields are separated by `|` and never quoted: a quotation mark belongs to the text. The last field has
numbers and abbreviations as words, and is read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.manifest import Row, make_row
from sparq.errors import SparqError
from sparq.files import read_lines

SPEAKER = "LJ"


def ljspeech_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the files that list what is read."""
    if subsets:
        raise SparqError(f"{folder}: unknown subset {subsets[0]!r}: LJSpeech has no subsets")
    return [folder / "metadata.csv"]


def read_ljspeech(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances in the order of metadata.csv.

    Raises:
        SparqError: metadata.csv is missing or has a line without three fields, or subsets are asked for.
    """
    (metadata,) = ljspeech_lists(folder, subsets)
    for number, line in enumerate(read_lines(metadata, "LJSpeech metadata"), start=1):
        fields = line.split("|")
        if len(fields) != 3:
            raise SparqError(f"{metadata}, line {number} has {len(fields)} fields: expected id|printed|spoken")
        id_, _, text = fields
        path = folder / "wavs" / f"{id_}.wav"
        yield make_row(f"{metadata}, line {number}", id=id_, path=path, speaker=SPEAKER, text=text)
