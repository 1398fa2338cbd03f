"""Exact products of small integers: what the weights look like in memory, and how they are multiplied."""

import torch
from jaxtyping import Int, Int8, Int32
from torch import Tensor
from torch.nn import functional

from sparq.errors import SparqError
from sparq.quantization.quantizer import split_groups

DIAGONAL_ROWS = 64
"""How many rows the product of a group at a time may have to be done as one product of sparse rows."""

GPU_MULTIPLE = 8
"""What cuBLASLt wants inputs and outputs of a product to be a multiple of."""

_GPU_ROWS = 17
"""The fewest rows that cuBLASLt multiplies."""

_EXACT_TERMS = 1024
"""How many products of two int8 float32 adds up exactly: each is at most 2^14, and integers up to 2^24 are exact."""

_BLOCK = 2**19
"""How many weights are turned into float32 at a time: they stay in the cache."""


def pack_halves(integers: Int8[Tensor, "rows columns"]) -> Int8[Tensor, "rows bytes"]:
    """Return integers of 4 bits, two a byte: column j plus 8 in the low half, column j + columns / 2 in the high one.

    Neighbors in a byte are far apart in the row, so each half of a row is unpacked by one operation on whole vectors,
    and each can be multiplied without the other.

    Args:
        integers: each in [-8, 7]; an even number of columns.
    """
    assert integers.shape[1] % 2 == 0, "two integers a byte"
    low, high = integers.chunk(2, dim=1)
    return (low + 8) | (high << 4)


def unpack_halves(packed: Int8[Tensor, "*rows bytes"]) -> Int8[Tensor, "*rows columns"]:
    """Return what `pack_halves` was given."""
    return torch.cat(((packed & 15) - 8, packed >> 4), dim=-1)


def require_exact_products(bits: int, device: torch.device) -> None:
    """Check that a device multiplies int8 activations by weights of so many bits exactly.

    Raises:
        SparqError: it does not, or cannot at all.
    """
    smallest = -(2 ** (bits - 1))
    left = torch.full((2, 64), 127, dtype=torch.int8, device=device)
    right = torch.full((16, 64), smallest, dtype=torch.int8, device=device)
    try:
        exact = bool((_columns(left, 0, 64, right) == 64 * 127 * smallest).all())
    except RuntimeError as error:
        raise SparqError(
            f"{device} has no int8 products ({str(error).splitlines()[0]}): keep the simulated model, or"
            " model.to('cpu') first"
        ) from error
    if not exact:
        raise SparqError(
            f"{device}'s int8 products are not exact for weights of {bits} bits: keep the simulated model, or quantize"
            " with activation_bits 16"
        )


def grouped_product(
    left: Int8[Tensor, "tokens inputs"], right: Int8[Tensor, "outputs _"], groups: int, *, halves: bool = False
) -> Int32[Tensor, "groups tokens outputs"]:
    """Return sum over each group of consecutive inputs of left * right, exact in int32.

    `torch._int_mm` multiplies int8 by int8 and accumulates in int32, on a CPU by oneDNN with VNNI instructions, on a
    GPU by cuBLASLt; a CPU without them goes by way of float32. A product of few tokens waits for the weights, so all
    groups are done in one: row (g, t) of the left side is token t with everything outside of group g set to zero. For
    many tokens that would be `groups` times the work; they go group by group.

    Args:
        left: activations, one row after the other in memory.
        right: weights, [outputs, inputs], or what `pack_halves` made of them; row after row in memory, which is the
            layout that is fastest for one token.
        groups: divides the number of inputs, and is smaller.
        halves: the weights are packed.
    """
    tokens, inputs = left.shape
    assert left.is_contiguous(), "the kernel is told strides"
    if groups == 1:
        return _product(left, right, halves=halves).unsqueeze(0)
    if tokens * groups <= DIAGONAL_ROWS:
        own = torch.eye(groups, dtype=torch.int8, device=left.device).reshape(groups, 1, groups, 1)
        rows = (split_groups(left, groups) * own).reshape(groups * tokens, inputs)
        return _product(rows, right, halves=halves).reshape(groups, tokens, -1)
    weight = unpack_halves(right) if halves else right
    size = inputs // groups
    starts = range(0, inputs, size)
    return torch.stack([_columns(left, start, size, weight[:, start : start + size]) for start in starts])


def _product(left: Tensor, right: Tensor, *, halves: bool) -> Tensor:
    inputs = left.shape[1]
    if not halves:
        return _columns(left, 0, inputs, right)
    half = inputs // 2
    product = _columns(left, 0, half, right & 15) + _columns(left, half, half, right >> 4)
    return product - 8 * left[:, :half].sum(1, keepdim=True, dtype=torch.int32)


def _columns(left: Tensor, start: int, size: int, right: Tensor) -> Tensor:
    if left.device.type != "cpu":
        # Copies begin where the kernel may expect a tensor to begin; rows of zeros make up the number that it takes.
        rows = functional.pad(left[:, start : start + size], (0, 0, 0, max(0, _GPU_ROWS - len(left)))).contiguous()
        return torch._int_mm(rows, right.contiguous().t())[: len(left)]
    if not _has_int8_instructions():
        multiply = _one_operation if torch.compiler.is_compiling() else float_product
        return multiply(left[:, start : start + size], right)
    # Inductor gives a row that stands alone a stride of 0, with which the kernel returns without having computed
    # anything and says nothing (pytorch issue 195066); so the strides are spelled out. They are those of a copy: of a
    # part of the columns Inductor keeps no more than the part, and the strides of the whole would read beyond it.
    assert size > 1, "the kernel leaves its output as it found it for sums of one product"
    if size < left.shape[1]:
        left = left[:, start : start + size].clone(memory_format=torch.contiguous_format)
    return torch._int_mm(left.as_strided((len(left), size), (size, 1)), right.t())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_int8_instructions() -> bool:
    """Tell whether the CPU has VNNI; the compiler cannot look into the question and would break the graph at it."""
    return bool(torch.cpu._is_vnni_supported())


def float_product(
    left: Int8[Tensor, "tokens inputs"], right: Int8[Tensor, "outputs inputs"]
) -> Int32[Tensor, "tokens outputs"]:
    """Return left @ right^T exactly, by float32 products of sums that float32 holds exactly.

    Without VNNI `torch._int_mm` is a plain loop, 30 times as slow for a prompt (AVX2), or adds pairs of products in 16
    bits, where those of large weights saturate (AVX-512).
    """
    if left.shape[1] > _EXACT_TERMS:
        parts = zip(*(torch.split(side, _EXACT_TERMS, dim=1) for side in (left, right)), strict=True)
        return torch.stack([float_product(*part) for part in parts]).sum(0, dtype=torch.int32)
    floats = left.float()
    blocks = torch.split(right, max(1, _BLOCK // right.shape[1]))
    return torch.cat([floats @ block.float().t() for block in blocks], dim=1).int()


@torch.library.custom_op("sparq::float_product", mutates_args=())
def _one_operation(left: Tensor, right: Tensor) -> Tensor:
    """`float_product` for the compiler, which would keep the weights as float32."""
    return float_product(left, right)


@_one_operation.register_fake
def _shape(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(len(left), len(right), dtype=torch.int32)


def correct_zero_points(
    product: Int32[Tensor, "groups tokens outputs"],
    left: Int8[Tensor, "tokens inputs"],
    left_zero_point: Int8[Tensor, "tokens _"] | None,
    right_sums: Int32[Tensor, "groups outputs"] | None,
    right_zero_point: Int[Tensor, "groups outputs"] | None,
) -> Int32[Tensor, "groups tokens outputs"]:
    """Return the product as if the zero points had been subtracted first, exact in int32.

    With zero points a of the left and b of the right side, and sums over one group of n inputs,

        sum (l - a) (r - b) = sum l r - a (sum r - n b) - b sum l

    because l - a and r - b themselves take up to 9 bits.

    Args:
        product: sum l r.
        left: l.
        left_zero_point: a, of a token or of each group of it; None is 0.
        right_sums: sum r - n b; needed where a is.
        right_zero_point: b; None is 0.
    """
    if left_zero_point is not None:
        assert right_sums is not None, "a zero point needs the sums of the other side"
        product = product - left_zero_point.t().unsqueeze(-1).int() * right_sums.unsqueeze(1)
    if right_zero_point is not None:
        sums = split_groups(left, len(product)).sum(-1, dtype=torch.int32)  # [tokens, groups]
        product = product - sums.t().unsqueeze(-1) * right_zero_point.int().unsqueeze(1)
    return product


def integer_accumulators(
    left: Int[Tensor, "tokens groups size"], right: Int[Tensor, "outputs groups size"]
) -> Int[Tensor, "tokens outputs groups"]:
    """Return the exact int32 sums of products that an integer kernel accumulates, one for each group.

    They are computed in float64, which is exact here and, unlike integers, has a fast product on a CPU.

    Args:
        left: integer activations, less their zero point.
        right: integer weights, less their zero point.
    """
    sums = torch.einsum("tgs,ogs->tog", left.double(), right.double())
    assert sums.numel() == 0 or sums.abs().max() < 2**31, "an int32 accumulator would overflow"
    return sums.int()
