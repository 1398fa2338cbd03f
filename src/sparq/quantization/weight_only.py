"""Linear layers with small weights and bfloat16 inputs: kernels that read the integers and multiply in bfloat16."""

from typing import final

import torch
from jaxtyping import BFloat16, Int8
from torch import Tensor, nn
from torch.nn import functional

from sparq.errors import SparqError
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.scheme import FLOAT_BITS

KERNEL_GROUPS = (256, 128, 64, 32)
"""The sizes of groups that PyTorch's kernel for 4 bits has, the fastest first."""

KERNEL_OUTPUTS = 16
"""What the number of outputs must be a multiple of, at 4 bits."""

KERNEL_INPUTS = 16
"""What the number of inputs must be a multiple of, at 8 bits; the kernel reads beyond the weights otherwise."""

_TILES = (8, 4, 2)
"""How many times 16 inputs a thread of the GPU's kernel for 4 bits may read at once, the fastest first."""

FEW_TOKENS = 32
"""Up to so many tokens the kernel for 8 bits is used; from there on it is slower than a cast and a bfloat16 product."""


def kernel_group(inputs: int, groups: int) -> int | None:
    """Return the largest group of the 4-bit kernel that divides the groups of a layer, or None where there is none."""
    return next((size for size in KERNEL_GROUPS if inputs // groups % size == 0), None)


@final
class WeightOnly8(nn.Module):
    """y = scale_w (x W_int^T) + bias, with one scale a row; inputs and outputs are bfloat16.

    The integers are exact in bfloat16 and the sum is one of float32. Rounded to bfloat16 are the scale and the output.
    Many tokens at once are multiplied by a bfloat16 copy of the integers that lives as long as the product, and rounded
    before and after the scale.

    Attributes:
        weight: int8 [outputs, inputs].
        weight_scale: bfloat16 [outputs].
        bias: bfloat16 [outputs], or None.
        inputs: a layer of no outputs that transforms the input.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take over the integers of a layer with symmetric weights and one scale a row; the tensor is shared."""
        super().__init__()
        assert layer.weight_scale is not None
        assert layer.weight_scale.shape[1] == 1, "one scale a row"
        assert layer.weight_zero_point is None, "no zero points"
        assert layer.in_features % KERNEL_INPUTS == 0, "the kernel would read beyond the weights"
        self.register_buffer("weight", layer.weight)
        self.register_buffer("weight_scale", layer.weight_scale.squeeze(1).bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.bfloat16())
        self.inputs = layer.without_outputs()

    def forward(self, x: BFloat16[Tensor, "*tokens inputs"]) -> BFloat16[Tensor, "*tokens outputs"]:
        """Return the layer's output."""
        rows = _rows(x, self.inputs)
        if len(rows) <= FEW_TOKENS:
            output = torch._weight_int8pack_mm(rows, self.weight, self.weight_scale)
        else:
            output = functional.linear(rows, self.weight.to(rows.dtype)) * self.weight_scale
        return _finished(output, self.bias, x)


@final
class WeightOnly4(nn.Module):
    """y = x W^T + bias, with W = scale_w (W_int - zero_point) in groups; inputs and outputs are bfloat16.

    The kernel makes bfloat16 weights of the integers, a few rows at a time, and sums in float32. Rounded to bfloat16
    are the scales, scale times zero point, the weights and the output.

    Attributes:
        packed: two integers a byte, in the order of the device's kernel: uint8 [outputs, inputs / 2] on a CPU; on a GPU
            int32 [outputs / 8, inputs / (16 tiles), 32, tiles / 2].
        scales_and_zeros: bfloat16 [groups, outputs, 2].
        group: inputs of one group.
        bias: bfloat16 [outputs], or None.
        inputs: a layer of no outputs that transforms the input.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take over the integers of a layer of at most 4 bits; a larger group becomes several equal ones."""
        super().__init__()
        assert layer.weight_scale is not None
        groups = layer.weight_scale.shape[1]
        group = kernel_group(layer.in_features, groups)
        assert group is not None, "no group of the kernel fits"
        self.group = group
        scale = layer.weight_scale
        # The kernel computes (field - 8) scale + zero.
        zero = torch.zeros_like(scale) if layer.weight_zero_point is None else -scale * layer.weight_zero_point
        repeats = layer.in_features // groups // group
        both = torch.stack((scale, zero), -1).repeat_interleave(repeats, dim=1)  # [outputs, groups, 2]
        self.register_buffer("packed", _packed(layer.weight))
        self.register_buffer("scales_and_zeros", both.transpose(0, 1).contiguous().bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.bfloat16())
        self.inputs = layer.without_outputs()

    def forward(self, x: BFloat16[Tensor, "*tokens inputs"]) -> BFloat16[Tensor, "*tokens outputs"]:
        """Return the layer's output."""
        rows = _rows(x, self.inputs)
        on_cpu = x.device.type == "cpu"
        if on_cpu != (self.packed.dtype == torch.uint8):
            raise SparqError(f"the 4-bit weights are not packed for {x.device}: move the model, then call to_integers")
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        output = multiply(rows, self.packed, self.group, self.scales_and_zeros)
        return _finished(output, self.bias, x)


def require_weight_only(device: torch.device, *, halves: bool) -> None:
    """Check the device's kernel for weights of 4 or 8 bits on a small product.

    Raises:
        SparqError: it has none, or one that computes something else.
    """
    outputs, inputs = 16, 64
    integers = torch.arange(outputs * inputs, device=device).view(outputs, inputs) % 15 - 7
    scale = torch.arange(1, outputs + 1, device=device)[:, None] / 64.0
    layer = QuantizedLinear(weight=integers.to(torch.int8), weight_scale=scale, bias=None, activation_bits=FLOAT_BITS)
    x = torch.eye(inputs, dtype=torch.bfloat16, device=device)[:FEW_TOKENS]
    try:
        product = (WeightOnly4(layer) if halves else WeightOnly8(layer))(x)
    except RuntimeError as error:
        raise SparqError(
            f"{device} has no kernel for weights of {4 if halves else 8} bits ({str(error).splitlines()[0]}): keep the"
            " simulated model, or model.to('cpu') first"
        ) from error
    # One weight an output: whatever the kernel rounds to bfloat16 is exact.
    if not torch.equal(product.float(), (integers * scale).t()[: len(x)]):
        raise SparqError(
            f"the kernel of {device} for weights of {4 if halves else 8} bits does not give their product: keep the"
            " simulated model, or model.to('cpu') first"
        )


def _packed(integers: Int8[Tensor, "outputs inputs"]) -> Tensor:
    """Return integers of 4 bits in the order that the device's kernel reads."""
    fields = integers.int() + 8
    if integers.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields, 1)  # type: ignore[no-any-return]
    # The left of two neighbors is the high half of a byte.
    pairs = (fields[:, ::2] << 4 | fields[:, 1::2]).to(torch.uint8)
    tiles = next(tiles for tiles in _TILES if integers.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)  # type: ignore[no-any-return]


def _rows(x: Tensor, inputs: QuantizedLinear) -> Tensor:
    # A kernel of another type would run without vectors, hundreds of times slower.
    assert x.dtype == torch.bfloat16, f"the kernels are fast for bfloat16 alone, not {x.dtype}"
    return inputs.seen(x).to(x.dtype).reshape(-1, x.shape[-1]).contiguous()


def _finished(output: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    output = output if bias is None else output + bias
    return output.reshape(*x.shape[:-1], -1)
