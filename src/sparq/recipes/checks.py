"""What the sections of a recipe share: checks whose message is one line: path, value, remedy."""

from collections.abc import Sequence
from typing import Any

from sparq.errors import SparqError

NO_EFFECT = {"affects_result": False}
"""Metadata of a field that changes how a step runs but not what it makes: it makes no finished step stale."""

ADDED_LATER = {"left_out_at_default": True}
"""Metadata of a field whose default does what runs did before it was there: at its default it makes none stale."""


def check(condition: bool, where: str, value: Any, right: str) -> None:
    """Raise a one-line error with the value and what would be right, unless the condition holds."""
    if not condition:
        raise SparqError(f"{where} is {value!r}: expected {right}")


def check_positive(where: str, **values: int | float) -> None:
    """Check that numbers are above 0."""
    for name, value in values.items():
        check(value > 0, f"{where}.{name}", value, "more than 0")


def check_not_empty(where: str, **values: str) -> None:
    """Check that texts hold more than white space."""
    for name, value in values.items():
        check(bool(value.strip()), f"{where}.{name}", value, "a name")


def check_unique(where: str, values: Sequence[str]) -> None:
    """Check that nothing is listed twice."""
    for value in values:
        if values.count(value) > 1:
            raise SparqError(f"{where} lists {value!r} twice: list it once")


def check_identifier(where: str, value: str, start: str) -> None:
    """Check a name that becomes part of file names: letters, digits, `-` and `_` after a given start."""
    valid = value.startswith(start) and value.isascii() and value.replace("-", "").replace("_", "").isalnum()
    right = f"letters, digits, '-' and '_' that start with {start!r}, such as '{start}-unseen-voice'"
    check(valid, where, value, right)
