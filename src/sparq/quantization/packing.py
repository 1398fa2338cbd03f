"""Small integers packed into bytes, for files: no bit is left out, whatever their width."""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor
from torch.nn import functional

_RUN = 8
"""Integers that begin at a byte and end with one: 8 of b bits take b bytes."""


def pack(integers: Int8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Return signed integers packed into ceil(columns bits / 8) bytes a row.

    A row is one string of bits, the first column in the lowest bits of the first byte.

    Args:
        integers: each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 7.
    """
    columns = integers.shape[1]
    runs = functional.pad(integers, (0, -columns % _RUN)).view(len(integers), -1, _RUN)
    joined = torch.zeros(runs.shape[:2], dtype=torch.int64, device=runs.device)  # 8 integers of 7 bits fit
    for index in range(_RUN):
        joined |= (runs[..., index].long() & (2**bits - 1)) << (index * bits)  # two's complement, cut to the field
    packed = torch.stack([joined >> (8 * index) & 255 for index in range(bits)], dim=-1).to(torch.uint8)
    return packed.flatten(1)[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> Int8[Tensor, "rows columns"]:
    """Return what `pack` was given."""
    runs = functional.pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    joined = torch.zeros(runs.shape[:2], dtype=torch.int64, device=runs.device)
    for index in range(bits):
        joined |= runs[..., index].long() << (8 * index)
    fields = torch.stack([(joined >> (index * bits) & (2**bits - 1)).to(torch.int8) for index in range(_RUN)], dim=-1)
    values = fields.flatten(1)[:, :columns]
    return torch.where(values >= 2 ** (bits - 1), values - 2**bits, values)


def packed_columns(columns: int, bits: int) -> int:
    """Return how many bytes a row of integers of 2 to 8 bits takes in a file."""
    return -(-columns * bits // 8)
