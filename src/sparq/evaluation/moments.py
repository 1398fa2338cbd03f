"""Kurtosis in float64, of one tensor or of a stream, by central moments (never by raw power sums)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def kurtosis(values: Float[Tensor, "*batch count"]) -> Float64[Tensor, "*batch"]:
    """Return the population kurtosis along the last axis.

    kurtosis = E[(x - mu)^4] / E[(x - mu)^2]^2

    It is 3 for a normal distribution, and `count` at most. There is no epsilon in the denominator, so it does
    not change when the values are shifted or scaled. The mean comes first and the deviations after it, in
    float64: sums of raw powers would lose every digit where the mean is large.

    Args:
        values: numbers of any floating type.

    Returns:
        One kurtosis a row; NaN where all the values of a row are equal, since it is undefined there.
    """
    wide = values.double()
    squares = (wide - wide.mean(dim=-1, keepdim=True)).square()
    return squares.square().mean(dim=-1) / squares.mean(dim=-1).square()


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The first four moments of the values seen so far; chunks merge exactly, in any grouping.

    Attributes:
        count: how many values.
        mean: their mean.
        m2: sum of (x - mean)^2.
        m3: sum of (x - mean)^3.
        m4: sum of (x - mean)^4.
    """

    count: int
    mean: float
    m2: float
    m3: float
    m4: float

    @classmethod
    def of(cls, values: Float[Tensor, "*shape"]) -> "Moments":
        """Return the moments of all the values of a tensor, in two passes and float64."""
        wide = values.double()
        mean = wide.mean()
        deviation = wide - mean
        squares = deviation.square()
        sums = torch.stack([mean, squares.sum(), (squares * deviation).sum(), squares.square().sum()]).tolist()
        return cls(count=values.numel(), mean=sums[0], m2=sums[1], m3=sums[2], m4=sums[3])

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values together (Pebay 2008, SAND2008-6212, section 2.1)."""
        a, b, n = self.count, other.count, self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=n,
            mean=self.mean + delta * b / n,
            m2=self.m2 + other.m2 + delta**2 * a * b / n,
            m3=self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * other.m2 - b * self.m2) / n,
            m4=self.m4
            + other.m4
            + delta**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * delta * (a * other.m3 - b * self.m3) / n,
        )

    @property
    def kurtosis(self) -> float:
        """The population kurtosis of all the values; NaN if they are all equal."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 else math.nan
