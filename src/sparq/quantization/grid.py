"""The values that quantized weights can have: scales and zero points of rows or groups, and how far they reach."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sparq.quantization.quantizer import dequantize, largest_integer, split_groups, usable_scale

WeightRange = Literal["max", "percentile", "mse"]
WEIGHT_RANGES: tuple[WeightRange, ...] = get_args(WeightRange)

RATIOS = torch.linspace(1.0, 0.4, 31)
"""Shares of the full range that `mse` tries."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the weights of a matrix can be: scale * (integer - zero_point).

    Attributes:
        scale: float32, positive.
        zero_point: integers of the same width; None for 0.
        bits: 2 to 8.
    """

    scale: Float[Tensor, "outputs groups"]
    zero_point: Int8[Tensor, "outputs groups"] | None
    bits: int

    def round(self, weight: Float[Tensor, "outputs inputs"]) -> Int8[Tensor, "outputs inputs"]:
        """Return the nearest integers."""
        grouped = split_groups(weight.float(), self.scale.shape[1])
        offset = None if self.zero_point is None else self.zero_point[..., None].float()
        return nearest(grouped, self.scale[..., None], offset, self.bits).to(torch.int8).view(weight.shape)

    def value(self, integers: Int8[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """Return what integers stand for."""
        return dequantize(integers, self.scale, self.zero_point)

    def column(self, index: int, columns: int) -> "Grid":
        """Return the grid of one column of a matrix of so many."""
        groups = self.scale.shape[1]
        group = slice(index * groups // columns, index * groups // columns + 1)
        zero_point = None if self.zero_point is None else self.zero_point[:, group]
        return Grid(scale=self.scale[:, group], zero_point=zero_point, bits=self.bits)


def weight_grid(
    weight: Float[Tensor, "outputs inputs"],
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    reach: WeightRange = "max",
    tail: float = 0.01,
    importance: Float[Tensor, " inputs"] | None = None,
) -> Grid:
    """Choose the grid of each row, or of every `group_size` consecutive columns of it.

    `max` reaches to the extreme weights. `percentile` leaves out the share `tail` of the weights, half of it at either
    end: the papers' weight clipping of 1 % and 5 %. `mse` takes, of 31 shares of the full range between 1 and 0.4, the
    one with the least squared rounding error, weighted by `importance` if given.

    Args:
        weight: the weights.
        bits: 2 to 8.
        group_size: columns that share a scale; it divides their number. None is the whole row.
        symmetric: no zero point, integers from -Q to Q with Q = 2^(bits-1) - 1.
        reach: how far the grid reaches.
        tail: share of weights that `percentile` leaves out.
        importance: weight of each column's squared error for `mse`; the mean square of its inputs makes that the
            error of the layer's output, were inputs independent.
    """
    columns = weight.shape[1]
    size = group_size or columns
    assert columns % size == 0, f"groups of {size} do not divide {columns} columns"
    grouped = split_groups(weight.float(), columns // size)
    if reach == "percentile":
        low = grouped.quantile(tail / 2, dim=-1, keepdim=True)
        high = grouped.quantile(1 - tail / 2, dim=-1, keepdim=True)
    else:
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, offset = range_steps(low, high, bits, symmetric=symmetric)
    if reach == "mse":
        weights = None if importance is None else split_groups(importance.float()[None], columns // size)
        best = torch.full_like(scale, float("inf"))
        for ratio in RATIOS.tolist():
            steps, zero = range_steps(low * ratio, high * ratio, bits, symmetric=symmetric)
            integers = nearest(grouped, steps, zero, bits)
            error = (integers if zero is None else integers.sub_(zero)).mul_(steps).sub_(grouped).square_()
            total = (error if weights is None else error * weights).sum(-1, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            scale = torch.where(better, steps, scale)
            if zero is not None and offset is not None:
                offset = torch.where(better, zero, offset)
    zero_point = None if offset is None else offset.squeeze(-1).to(torch.int8)
    return Grid(scale=scale.squeeze(-1), zero_point=zero_point, bits=bits)


def range_steps(
    low: Float[Tensor, "..."], high: Float[Tensor, "..."], bits: int, *, symmetric: bool
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """Return scale and zero point of a range; the formulas are those of `quantizer`."""
    if symmetric:
        return usable_scale(torch.maximum(high, -low) / largest_integer(bits)), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = usable_scale((high - low) / (2**bits - 1))
    return scale, -(2 ** (bits - 1)) - (low / scale).round()


def nearest(
    x: Float[Tensor, "..."], scale: Float[Tensor, "..."], offset: Float[Tensor, "..."] | None, bits: int
) -> Float[Tensor, "..."]:
    """Return the nearest integers of a grid, as float32; `offset` is its zero point."""
    largest = largest_integer(bits)
    integers = (x / scale).round_()
    # Without a zero point the integer -Q-1 is not used.
    return integers.clamp_(-largest, largest) if offset is None else integers.add_(offset).clamp_(-largest - 1, largest)
