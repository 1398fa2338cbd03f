"""What readers share: subsets, sorted folders, names of splits."""

import os
from collections.abc import Sequence
from pathlib import Path

from sparq.errors import SparqError, near_matches

_SPLITS = {"train": "train", "dev": "valid", "valid": "valid", "validation": "valid", "test": "test"}


def choose_subsets(folder: Path, subsets: Sequence[str], known: Sequence[str], looks_like: str) -> list[str]:
    """Return the subsets to read: those asked for, or all that are there, in the order of `known`.

    Args:
        folder: the corpus.
        subsets: the names asked for; none asks for all.
        known: the names that the corpus is published with.
        looks_like: a path in the corpus, to say in messages.

    Raises:
        SparqError: a name is unknown, asked for twice, or not in the folder, or nothing is there.
    """
    for subset in subsets:
        if subset not in known:
            raise SparqError(f"{folder}: unknown subset {subset!r}: {near_matches(subset, known)}")
        if subsets.count(subset) > 1:
            raise SparqError(f"{folder}: subset {subset!r} is listed twice: list it once")
        if not (folder / subset).is_dir():
            raise SparqError(f"{folder} has no subset {subset!r}: expected {looks_like}")
    found = list(subsets) or [name for name in known if (folder / name).is_dir()]
    if not found:
        raise SparqError(f"{folder} holds none of {', '.join(known)}: expected {looks_like}")
    return found


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders inside, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def file_names(folder: Path, suffix: str) -> list[str]:
    """Return the names of the files inside that end with `suffix`, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.endswith(suffix) and entry.name[0] != ".")


def split_of(name: str) -> str:
    """Return the split that a published name stands for: `train-clean-100` is train, `dev` valid; "" if none."""
    if name in ("test-clean", "test-other"):
        return name
    return _SPLITS.get(name.partition("-")[0].partition("_")[0], "")
