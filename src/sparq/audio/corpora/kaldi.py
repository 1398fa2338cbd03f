"""Kaldi data directories.

    data/train/wav.scp      RECORDING PATH                      required
    data/train/segments     UTTERANCE RECORDING START END       seconds; without it a recording is an utterance
    data/train/text         UTTERANCE TEXT
    data/train/utt2spk      UTTERANCE SPEAKER

A path is relative to the data directory. Where wav.scp has a command that ends with a pipe, it is refused and never
run. Words in angle brackets, such as `<unk>`,
are normalized as any text, so remove them before.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import split_of
from sparq.audio.corpora.lookup import Lookup
from sparq.audio.manifest import Fault, Row, make_row
from sparq.audio.waveform import Segment
from sparq.errors import SparqError
from sparq.files import read_lines

LISTS = ("wav.scp", "segments", "text", "utt2spk")


def kaldi_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the files that list what is read."""
    places = [folder / name for name in subsets] or [folder]
    return [place / name for place in places for name in LISTS if name == "wav.scp" or (place / name).exists()]


def read_kaldi(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the utterances in the order of segments, or of wav.scp. The files need not be sorted.

    Args:
        folder: a data directory, or the folder of several.
        subsets: names of data directories in it; `train`, `dev...` and `test...` give their utterances a split.

    Raises:
        SparqError: wav.scp is missing, a line is malformed, or a name comes twice.
    """
    for name in subsets or ("",):
        yield from _directory(folder / name, split_of(name))


def _directory(place: Path, split: str) -> Iterator[Row]:
    scp, segments = place / "wav.scp", place / "segments"
    with contextlib.ExitStack() as stack:
        texts = _table(place / "text", stack)
        speakers = _table(place / "utt2spk", stack)
        recordings = Lookup(_pairs(scp), str(scp)) if segments.exists() else None
        if recordings is not None:
            stack.enter_context(recordings)
        for where, id_, path, segment in _cuts(segments, recordings) if recordings else _whole(scp):
            text = texts.get(id_) if texts else ""
            speaker = speakers.get(id_) if speakers else ""
            wrong = None
            if path is None:
                wrong = f"no recording of that name in {scp}: add it"
            elif path.endswith("|"):
                wrong = f"{scp} has a command, which is never run: write its output to a file and name that"
            elif text is None or speaker is None:
                wrong = f"no line of it in {place / ('text' if text is None else 'utt2spk')}: add it"
            if wrong:
                yield Fault(id=id_, path=place, reason=f"{where}, utterance {id_!r}: {wrong}")
            else:
                yield make_row(
                    where, id=id_, path=place / str(path), speaker=str(speaker), split=split, segment=segment,
                    text=str(text),
                )  # fmt: skip


def _table(path: Path, stack: contextlib.ExitStack) -> Lookup | None:
    return stack.enter_context(Lookup(_pairs(path), str(path))) if path.exists() else None


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path, "Kaldi list"), start=1):
        fields = line.split(maxsplit=1)
        # An utterance may have been heard to say nothing.
        if len(fields) == 1 and path.name == "text":
            fields.append("")
        if len(fields) != 2:
            raise SparqError(f"{path}, line {number} is {line!r}: expected a name, a space and a value")
        yield fields[0], fields[1].strip()


def _whole(scp: Path) -> Iterator[tuple[str, str, str, None]]:
    for number, (name, path) in enumerate(_pairs(scp), start=1):
        yield f"{scp}, line {number}", name, path, None


def _cuts(segments: Path, recordings: Lookup) -> Iterator[tuple[str, str, str | None, Segment]]:
    for number, line in enumerate(read_lines(segments, "Kaldi list"), start=1):
        where = f"{segments}, line {number}"
        fields = line.split()
        try:
            id_, recording, start, end = fields[0], fields[1], float(fields[2]), float(fields[3])
        except (IndexError, ValueError) as error:
            raise SparqError(f"{where} is {line!r}: expected UTTERANCE RECORDING START END") from error
        if len(fields) > 4 or not 0 <= start < end < math.inf:
            raise SparqError(f"{where} is {line!r}: expected a start and a later end, in seconds")
        yield where, id_, recordings.get(recording), Segment(start=start, seconds=end - start)
