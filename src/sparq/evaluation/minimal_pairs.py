"""Zero-resource scores: of two recordings, does the model find the right one likelier?"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparq.errors import SparqError

GOLD = "gold.csv"
LEXICAL_COLUMNS = ("id", "filename", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC_COLUMNS = ("id", "filename", "voice", "type", "subtype", "transcription", "correct")
PAIR_COLUMNS = ("id", "correct", "incorrect")

_Groups = Callable[[Mapping[str, str]], tuple[str, ...]]

_BANDS = ((1, "oov"), (6, "1-5"), (21, "6-20"), (101, "21-100"))


@dataclass(frozen=True, kw_only=True)
class MinimalPair:
    """Two recordings of which one is right.

    Attributes:
        item: what the pair is about; pairs of one item by several voices count as one.
        groups: the parts of the score that it belongs to, such as `frequency 6-20`.
        correct: the right recording.
        incorrect: the other.
    """

    item: str
    groups: tuple[str, ...]
    correct: Path
    incorrect: Path


@dataclass(frozen=True, kw_only=True)
class PairAccuracy:
    """How often the right one of a pair is likelier.

    Attributes:
        percent: mean over items of the mean over the item's pairs; a tie counts half.
        items: how many.
        pairs: how many.
    """

    percent: float
    items: int
    pairs: int


def read_swuggy(folder: Path) -> list[MinimalPair]:
    """Return the pairs of sWUGGY (ZeroSpeech 2021, `lexical/dev`): a word and a non-word, by each voice.

    Groups: the bands of the challenge by the word's frequency in LibriSpeech, and `in vocabulary` for all but `oov`. A
    word of unknown frequency is in none.

    Raises:
        SparqError: `gold.csv` is missing or not of its columns, a pair is incomplete, or a recording is missing.
    """
    return _pair(folder, _read_table(folder / GOLD, LEXICAL_COLUMNS, ","), ("id",), _frequency_groups)


def read_sblimp(folder: Path) -> list[MinimalPair]:
    """Return the pairs of sBLIMP (ZeroSpeech 2021, `syntactic/dev`): two sentences, by each voice.

    Groups: the types of the sentences' syntax.

    Raises:
        SparqError: as `read_swuggy`.
    """
    rows = _read_table(folder / GOLD, SYNTACTIC_COLUMNS, ",")
    return _pair(folder, rows, ("type", "subtype", "id"), lambda row: (f"type {row['type']}",))


def read_pairs(file: Path) -> list[MinimalPair]:
    """Return the pairs of a TSV with the columns `id`, `correct` and `incorrect`, paths from its folder.

    For StoryCloze (Hassid et al. 2023) and the like, which are published as recordings only.

    Raises:
        SparqError: the file is missing or not of these columns, or a recording is missing.
    """
    return [
        MinimalPair(
            item=row["id"],
            groups=(),
            correct=_recording(file.parent / row["correct"]),
            incorrect=_recording(file.parent / row["incorrect"]),
        )
        for row in _read_table(file, PAIR_COLUMNS, "\t")
    ]


def pair_accuracies(pairs: Sequence[MinimalPair], scores: Mapping[Path, float]) -> dict[str, PairAccuracy]:
    """Return the accuracy over all pairs, under `all`, and over each group.

    Args:
        pairs: at least one.
        scores: the model's score of each recording, higher for likelier.
    """
    assert pairs, "accuracy of nothing"
    parts: dict[str, dict[str, list[float]]] = {}
    for pair in pairs:
        right, wrong = scores[pair.correct], scores[pair.incorrect]
        point = 0.5 if right == wrong else float(right > wrong)
        for name in ("all", *pair.groups):
            parts.setdefault(name, {}).setdefault(pair.item, []).append(point)
    return {
        name: PairAccuracy(
            percent=100 * sum(sum(points) / len(points) for points in items.values()) / len(items),
            items=len(items),
            pairs=sum(map(len, items.values())),
        )
        for name, items in parts.items()
    }


def _frequency_groups(row: Mapping[str, str]) -> tuple[str, ...]:
    if not row["frequency"].strip():
        return ()
    frequency = float(row["frequency"])
    band = next((name for bound, name in _BANDS if frequency < bound), ">100")
    return (f"frequency {band}",) if band == "oov" else ("in vocabulary", f"frequency {band}")


def _pair(folder: Path, rows: Sequence[Mapping[str, str]], item: tuple[str, ...], groups: _Groups) -> list[MinimalPair]:
    found: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        key = (*(row[name] for name in item), row["voice"])
        members = found.setdefault(key, {})
        if row["correct"] not in ("0", "1") or row["correct"] in members:
            raise SparqError(
                f"{folder / GOLD}: {row['filename']!r} has correct {row['correct']!r}: each {'/'.join(item)} and voice"
                " needs one row with 1 and one with 0"
            )
        members[row["correct"]] = row
    pairs = []
    for key, members in found.items():
        if len(members) != 2:
            raise SparqError(
                f"{folder / GOLD}: {'/'.join(key)} has one row: it needs one with correct 1 and one with 0"
            )
        right, wrong = members["1"], members["0"]
        pairs.append(
            MinimalPair(
                item="/".join(key[:-1]),
                groups=groups(right),
                correct=_recording(folder / f"{right['filename']}.wav"),
                incorrect=_recording(folder / f"{wrong['filename']}.wav"),
            )
        )
    return pairs


def _recording(path: Path) -> Path:
    if not path.is_file():
        raise SparqError(f"no such file: {path}")
    return path


def _read_table(path: Path, columns: Sequence[str], delimiter: str) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise SparqError(f"{path} lacks the column {missing[0]!r}: it needs {', '.join(columns)}")
            rows = list(reader)
    except FileNotFoundError as error:
        raise SparqError(f"no such file: {path}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise SparqError(f"{path} is not a table: {error}") from error
    for number, row in enumerate(rows, 2):
        if None in row or any(row[name] is None for name in columns):
            raise SparqError(f"{path}, line {number} has not as many fields as the header")
    if not rows:
        raise SparqError(f"{path} has no rows")
    return rows
