"""Uniform quantization of tensors: symmetric and asymmetric, per row or per group of columns.

Everything is computed in float32, whatever the type of the input. Rounding is half to even (IEEE 754, as
`torch.round`), which is what integer kernels and ONNX do. Inputs must be finite; a NaN or infinity spreads to
the values that share its scale when simulated, and has no integer.
"""

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A smaller scale is not a normal float32 number, so a quotient by it means little: such rows become 0."""


def largest_integer(bits: int) -> int:
    """Return 2^(bits-1) - 1, the largest signed integer of that many bits."""
    return int(2 ** (bits - 1) - 1)


def quantize_symmetric(
    x: Float[Tensor, "*rows columns"], bits: int, group_size: int | None = None, *, clip: float = 1.0
) -> tuple[Int8[Tensor, "*rows columns"], Float[Tensor, "*rows groups"]]:
    """Quantize so that zero maps to zero and both signs have the same range.

    With Q = 2^(bits-1) - 1, for every row, or every `group_size` consecutive columns of it,

        scale = clip max|x| / Q        integer = clamp(round(x / scale), -Q, Q)        x ~ scale * integer

    (SmoothQuant, equation 1, has clip = 1). The integer -Q-1 is not used. The error is at most scale / 2 but for what
    is clipped. Where all of x is zero the scale is 1.

    Args:
        x: the values. Flatten a tensor to one row for one scale in all.
        bits: 2 to 8.
        group_size: columns that share a scale; it divides the number of columns. None is the whole row.
        clip: share of the range that is covered, more than 0 and at most 1.

    Returns:
        The integers, and the float32 scale of each group.
    """
    grouped = _group(x, group_size)
    scale = _symmetric_scale(grouped, bits, clip)
    integers = _symmetric_integers(grouped, scale, bits)
    return integers.to(torch.int8).reshape(x.shape), scale.squeeze(-1)


def quantize_asymmetric(
    x: Float[Tensor, "*rows columns"], bits: int, group_size: int | None = None, *, clip: float = 1.0
) -> tuple[Int8[Tensor, "*rows columns"], Float[Tensor, "*rows groups"], Int8[Tensor, "*rows groups"]]:
    """Quantize the range from low = clip min(x, 0) to high = clip max(x, 0) onto all 2^bits integers.

    With q = -2^(bits-1), the smallest integer,

        scale = (high - low) / (2^bits - 1)        zero_point = q - round(low / scale)
        integer = clamp(round(x / scale) + zero_point, q, -q - 1)        x ~ scale * (integer - zero_point)

    The range contains zero, so that zero is exact and the zero point is an integer of the same width. The integers are
    signed: they are the usual 0 to 2^bits - 1, less 2^(bits-1). The error is at most scale / 2 but for what is
    clipped.

    Args:
        x: the values. Flatten a tensor to one row for one scale in all.
        bits: 2 to 8.
        group_size: columns that share a scale; it divides the number of columns. None is the whole row.
        clip: share of the range that is covered, more than 0 and at most 1.

    Returns:
        The integers, and the float32 scale and the zero point of each group.
    """
    grouped = _group(x, group_size)
    scale, zero_point = _asymmetric_range(grouped, bits, clip)
    integers = _asymmetric_integers(grouped, scale, zero_point, bits)
    return (
        integers.to(torch.int8).reshape(x.shape),
        scale.squeeze(-1),
        zero_point.to(torch.int8).squeeze(-1),
    )


def dequantize(
    integers: Int8[Tensor, "*rows columns"],
    scale: Float[Tensor, "*rows groups"],
    zero_point: Int8[Tensor, "*rows groups"] | None = None,
) -> Float[Tensor, "*rows columns"]:
    """Return scale * (integer - zero_point) in float32; the shape of the scale tells the size of a group."""
    values = _group(integers, integers.shape[-1] // scale.shape[-1])
    if zero_point is not None:
        values = values - zero_point.unsqueeze(-1)
    return (values * scale.float().unsqueeze(-1)).reshape(integers.shape)


def fake_quantize(
    x: Float[Tensor, "*rows columns"], bits: int, *, symmetric: bool, clip: float = 1.0
) -> Float[Tensor, "*rows columns"]:
    """Return, in float32, each row quantized and dequantized again, without an integer tensor between.

    The result is that of `dequantize` after `quantize_symmetric` or `quantize_asymmetric`, bit for bit.
    """
    x = x.float()
    if symmetric:
        scale = _symmetric_scale(x, bits, clip)
        return _symmetric_integers(x, scale, bits).mul_(scale)
    scale, zero_point = _asymmetric_range(x, bits, clip)
    return _asymmetric_integers(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)


def split_groups(x: Shaped[Tensor, "*rows columns"], groups: int) -> Shaped[Tensor, "*rows groups size"]:
    """Return the columns of every row as `groups` runs of consecutive columns."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _group(x: Tensor, group_size: int | None) -> Tensor:
    columns = x.shape[-1]
    size = group_size or columns
    assert columns % size == 0, f"groups of {size} do not divide {columns} columns"
    return split_groups(x.float(), columns // size)


def _symmetric_scale(x: Tensor, bits: int, clip: float) -> Tensor:
    # Two reductions are several times faster on a CPU than aminmax or an infinity norm.
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    return usable_scale(largest * clip / largest_integer(bits))


def _symmetric_integers(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    largest = largest_integer(bits)
    return (x / scale).round_().clamp_(-largest, largest)


def _asymmetric_range(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    low = x.amin(-1, keepdim=True).clamp_(max=0).mul_(clip)
    high = x.amax(-1, keepdim=True).clamp_(min=0).mul_(clip)
    scale = usable_scale((high - low) / (2**bits - 1))
    return scale, -(2 ** (bits - 1)) - (low / scale).round_()


def _asymmetric_integers(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    # max(x) can land one above the range when min(x)/scale is a tie, for rounding half to even is not
    # invariant to shifts.
    smallest = -(2 ** (bits - 1))
    return (x / scale).round_().add_(zero_point).clamp_(smallest, -smallest - 1)


def usable_scale(scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the scale, 1 where it is too small to divide by."""
    return scale.masked_fill(scale < SMALLEST_SCALE, 1.0)
