"""Libri-Light (Kahn et al. 2020): 60,000 hours without text.

    small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb.flac
    small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb.json

Folders are speaker and book, a file is a chapter of minutes to an hour. The JSON beside it has `voice_activity`, a
list of [start, end] in seconds, along which a chapter is cut: neighboring stretches of speech are joined up to
`CUT_SECONDS`, pauses between them included, and a longer stretch is cut into equal parts. (The paper's own cuts take
the pauses out.)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sparq.audio.corpora.folders import choose_subsets, file_names, subfolders
from sparq.audio.manifest import Fault, Row, make_row
from sparq.audio.waveform import MIN_SECONDS, Segment
from sparq.errors import SparqError
from sparq.files import read_json
from sparq.types import Seconds

SUBSETS = ("small", "medium", "large", "duplicate")

CUT_SECONDS: Seconds = 20.0
"""The longest cut: the length of LibriSpeech's longer utterances."""


def read_librilight(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the cuts by subset, speaker, book and chapter; a chapter without usable JSON is a `Fault`.

    Raises:
        SparqError: the folder does not hold the subsets.
    """
    for subset in choose_subsets(folder, subsets, SUBSETS, "small/SPEAKER/BOOK/CHAPTER.flac and .json"):
        for speaker in subfolders(folder / subset):
            for book in subfolders(folder / subset / speaker):
                place = folder / subset / speaker / book
                for name in file_names(place, ".flac"):
                    yield from _chapter(place / name, f"{speaker}-{book}", speaker)


def _chapter(path: Path, prefix: str, speaker: str) -> Iterator[Row]:
    id_ = f"{prefix}-{path.stem}"
    file = path.with_suffix(".json")
    try:
        segments = list(cut(_voice_activity(file)))
    except SparqError as error:
        yield Fault(id=id_, path=path, reason=f"utterance {id_!r}: {error}")
        return
    for number, segment in enumerate(segments):
        yield make_row(str(file), id=f"{id_}-{number:04d}", path=path, speaker=speaker, segment=segment)


def _voice_activity(file: Path) -> list[tuple[Seconds, Seconds]]:
    content = read_json(file)
    spans = content.get("voice_activity") if isinstance(content, dict) else None
    right = "expected `voice_activity`, a list of [start, end] in seconds, in order"
    if not isinstance(spans, list):
        raise SparqError(f"{file} says nothing of speech: {right}")
    last = 0.0
    for span in spans:
        numbers = isinstance(span, list) and len(span) == 2 and all(isinstance(x, int | float) for x in span)
        if not numbers or not last <= span[0] < span[1] < math.inf:
            raise SparqError(f"{file} has the stretch {span!r}: {right}")
        last = span[1]
    return [(float(start), float(end)) for start, end in spans]


def cut(spans: Iterable[tuple[Seconds, Seconds]], longest: Seconds = CUT_SECONDS) -> Iterator[Segment]:
    """Join stretches of speech, (start, end) in seconds and in order, into segments of at most `longest` seconds.

    Stretches are joined greedily; one that is longer alone is cut into equal parts. What is shorter than any
    utterance may be is left out.
    """
    start = end = None
    for first, last in (*spans, (math.inf, math.inf)):
        if start is not None and end is not None and last - start > longest:
            num_parts = math.ceil((end - start) / longest)
            length = (end - start) / num_parts
            if length >= MIN_SECONDS:
                yield from (Segment(start=start + i * length, seconds=length) for i in range(num_parts))
            start = None
        start, end = (first if start is None else start), last
