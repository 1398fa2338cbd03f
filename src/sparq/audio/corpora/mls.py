"""Multilingual LibriSpeech (Pratap et al. 2020), OpenSLR 94, original FLAC or Opus.

    mls_english/train/transcripts.txt                       a line each: 4800_10003_000000 TAB text
    mls_english/train/audio/4800/10003/4800_10003_000000.flac

An id is speaker, book and number. Other languages have the same layout; text must be in Latin script.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import choose_subsets, split_of
from sparq.audio.manifest import Row, make_row
from sparq.errors import SparqError
from sparq.files import read_lines

SUBSETS = ("train", "dev", "test")


def mls_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the files that list what is read."""
    names = choose_subsets(folder, subsets, SUBSETS, "mls_english/train/transcripts.txt")
    return [folder / name / "transcripts.txt" for name in names]


def read_mls(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances in the order of the transcripts.

    Raises:
        SparqError: the folder does not hold the subsets, or a line of a transcript is malformed.
    """
    for transcript in mls_lists(folder, subsets):
        subset, suffix = transcript.parent, ""
        for number, line in enumerate(read_lines(transcript, "transcript"), start=1):
            id_, tab, text = line.partition("\t")
            parts = id_.split("_")
            if not tab or len(parts) != 3:
                raise SparqError(
                    f"{transcript}, line {number} is {line!r}: expected SPEAKER_BOOK_NUMBER, a tab, a text"
                )
            speaker, book, _ = parts
            path = subset / "audio" / speaker / book / f"{id_}.flac"
            if not suffix:  # the whole corpus is published as either
                suffix = ".opus" if path.with_suffix(".opus").is_file() else ".flac"
            yield make_row(
                f"{transcript}, line {number}", id=id_, path=path.with_suffix(suffix), speaker=speaker,
                split=split_of(subset.name), text=text,
            )  # fmt: skip
