"""The one error that a user sees: a line with the offending value and what would be right."""

import difflib
from collections.abc import Iterable


class SparqError(ValueError):
    """A user's mistake or a fault of the surroundings; the command line prints it as one line and exits with 2."""


def near_matches(value: str, valid: Iterable[str]) -> str:
    """Return a phrase that names the valid values nearest to `value`, or all of them if none is near.

    >>> near_matches("sofmax1", ["vanilla", "softmax1", "max_shift"])
    "did you mean 'softmax1'?"
    """
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(value, valid, n=2, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "valid: " + ", ".join(valid)


def unknown(kind: str, value: str, valid: Iterable[str]) -> SparqError:
    """Return the error for a name outside of its list, with near matches."""
    return SparqError(f"unknown {kind} {value!r}: {near_matches(value, valid)}")
