"""Quantization with a gradient: the rounding passes it on as it is, ranges and clips have their true one.

Bengio et al. 2013, arXiv 1308.3432. The values are those of `quantizer`, up to the order of float32 operations.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparq.quantization.quantizer import SMALLEST_SCALE, largest_integer, split_groups

WIDE = 4.0
"""Where learned clipping starts: sigmoid(4) is 98 % of the range, as in the authors' code."""


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def pass_through(x: Float[Tensor, "..."], value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `value`, which has no gradient, as if it were x: the gradient is that of the identity.

    Unlike x + (value - x) it is `value` bit for bit, and keeps nothing for the backward pass.
    """
    result: Tensor = _PassThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def round_through(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round to the nearest integer, half to even; the gradient is that of the identity."""
    return pass_through(x, x.detach().round())


def quantize_through(
    x: Float[Tensor, "*rows columns"],
    bits: int,
    *,
    symmetric: bool,
    low_share: Float[Tensor, "*rows 1"] | float = 1.0,
    high_share: Float[Tensor, "*rows 1"] | float = 1.0,
) -> Float[Tensor, "*rows columns"]:
    """Quantize and dequantize each row, with a gradient for the values and for how much of the range is covered.

    Args:
        x: the values.
        bits: 2 to 8.
        symmetric: no zero point; then only `high_share` counts.
        low_share: share of min(x, 0) that is covered.
        high_share: share of max(x, 0), or of max|x|, that is covered.
    """
    scale, offset = learned_range(x, bits, symmetric=symmetric, low_share=low_share, high_share=high_share)
    largest = largest_integer(bits)
    integers = round_through(x / scale)
    if offset is None:
        return integers.clamp(-largest, largest) * scale
    return ((integers + offset).clamp(-largest - 1, largest) - offset) * scale


def learned_range(
    x: Float[Tensor, "*rows columns"],
    bits: int,
    *,
    symmetric: bool,
    low_share: Float[Tensor, "*rows 1"] | float,
    high_share: Float[Tensor, "*rows 1"] | float,
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"] | None]:
    """Return scale and, unless symmetric, zero point of `quantize_through`."""
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) * high_share / largest_integer(bits)
        return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale), None
    low = x.amin(-1, keepdim=True).clamp(max=0) * low_share
    high = x.amax(-1, keepdim=True).clamp(min=0) * high_share
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return scale, -(2 ** (bits - 1)) - round_through(low / scale)


def in_groups(x: Float[Tensor, "*rows columns"], group_size: int | None) -> Float[Tensor, "*rows groups size"]:
    """Return weights or activations with the columns that share a scale as rows of their own."""
    return split_groups(x, x.shape[-1] // (group_size or x.shape[-1]))
