"""What a run leaves to be drawn: training curves, attention heat maps and hidden-state maps."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np
from jaxtyping import Float

from sparq.errors import SparqError
from sparq.report.numbers import show_number

Matrix = tuple[tuple[float, ...], ...]
"""A two-dimensional array as JSON has it: a list of rows of one length."""


def matrix(values: Float[np.ndarray, "rows columns"], *, digits: int = 4) -> Matrix:
    """Return an array as rows of floats, rounded to `digits` significant digits to keep the file small."""
    return tuple(tuple(float(f"{value:.{digits}g}") for value in row) for row in values.tolist())


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A logged moment of training: losses in nats per token, accuracy of the next token in [0, 1].

    `epochs` says how often the training split had been gone through, where the log has it; `valid_max_norm` is the
    largest element of the layers' outputs on the validation set.
    """

    update: int
    tokens: int
    seconds: float
    loss: float
    lr: float
    valid_accuracy: float | None = None
    valid_loss: float | None = None
    valid_max_norm: float | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class LiveSlice:
    """A part of a stored training that this run did again.

    Attributes:
        points: the log of the repeated part.
        max_abs_difference: largest absolute difference of its losses to the stored ones at the same updates; None where
            its updates did not have as many tokens, so that their batches were others.
    """

    points: tuple[CurvePoint, ...]
    max_abs_difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """The training log of one framework; `live` where a stored training was partly repeated."""

    points: tuple[CurvePoint, ...]
    live: LiveSlice | None = None

    def comparison(self) -> str:
        """Say how the losses of the repeated part compare with the stored ones."""
        assert self.live is not None
        if self.live.max_abs_difference is not None:
            return f"losses differ from the stored ones by {show_number(self.live.max_abs_difference)} at most"
        updates = {point.update for point in self.live.points}
        live, stored = (
            show_number(fmean(point.loss for point in points))
            for points in (self.live.points, [point for point in self.points if point.update in updates])
        )
        return (
            "batches are not the stored ones, because some frames got other units on this processor; mean loss"
            f" {live}, stored {stored}"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """What one head does on one sample (SpARQ figure 4).

    Attributes:
        framework: kind of attention.
        layer: index of the layer.
        head: index of the query head.
        weights: probabilities, rows are queries and columns keys.
        values: |value| that the head reads, rows are keys and columns channels of the head.
        outputs: |what the head adds up|, rows are queries and columns channels.
        labels: the tokens, which are queries and keys.
    """

    framework: str
    layer: int
    head: int
    weights: Matrix
    values: Matrix
    outputs: Matrix
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        what, tokens = f"attention map of {self.framework}", len(self.labels)
        _check_matrix(what, self.weights, rows=tokens, columns=tokens)
        _check_matrix(f"{what}, values", self.values, rows=tokens)
        _check_matrix(f"{what}, outputs", self.outputs, rows=tokens)


@dataclass(frozen=True, kw_only=True)
class HiddenMap:
    """Largest absolute layer output, rows are tokens (named by `labels`) and columns layers."""

    framework: str
    norms: Matrix
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_matrix(f"hidden map of {self.framework}", self.norms, rows=len(self.labels))


def _check_matrix(what: str, values: Matrix, *, rows: int | None = None, columns: int | None = None) -> None:
    widths = {len(row) for row in values}
    if len(widths) != 1 or widths == {0}:
        raise SparqError(f"{what} has rows of lengths {sorted(widths)}: one length above 0 is needed")
    shape = (len(values), widths.pop())
    if rows not in (None, shape[0]) or columns not in (None, shape[1]):
        raise SparqError(f"{what} is {shape[0]} x {shape[1]} but has {rows or columns} labels")
