"""Small integers packed into bytes, for files."""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor
from torch.nn import functional


def field_width(bits: int) -> int:
    """Return the number of bits that an integer of `bits` bits takes in a file: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def pack(integers: Int8[Tensor, "rows columns"], width: int) -> UInt8[Tensor, "rows bytes"]:
    """Return signed integers packed into bytes, the first column in the lowest bits, rows padded with zeros.

    Args:
        integers: each in [-2^(width-1), 2^(width-1) - 1].
        width: bits a field: 2 or 4.
    """
    per_byte = 8 // width
    fields = (integers & (2**width - 1)).to(torch.uint8)  # two's complement, cut to the field
    fields = functional.pad(fields, (0, -fields.shape[1] % per_byte))
    fields = fields.reshape(len(fields), -1, per_byte)
    packed: Tensor = fields[..., 0].clone()
    for index in range(1, per_byte):
        packed |= fields[..., index] << (index * width)
    return packed


def unpack(packed: UInt8[Tensor, "rows bytes"], width: int, columns: int) -> Int8[Tensor, "rows columns"]:
    """Return what `pack` was given."""
    fields = torch.stack([(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)], dim=-1)
    values = fields.flatten(1)[:, :columns].to(torch.int8)
    return torch.where(values >= 2 ** (width - 1), values - 2**width, values)
