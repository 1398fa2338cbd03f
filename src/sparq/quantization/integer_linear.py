"""Quantized linear layers that compute with the integers themselves."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.products import correct_zero_points, grouped_product, pack_halves
from sparq.quantization.quantizer import split_groups
from sparq.quantization.scales import KeepsScales


@final
class IntegerLinear(KeepsScales):
    """y = sum over groups of scale_x scale_w (x_int W_int^T) + bias, with exact products of int8 by int8 in int32.

    It gives what `QuantizedLinear` simulates: the same accumulators bit for bit, and outputs that differ by the
    rounding of float32. Weights of 5 to 8 bits take a byte in memory. Those of 2 to 4 bits take half of one and are
    unpacked to int8 at every use. There is no copy in floating point.

    Several layers that read one input are one layer here: their outputs follow each other, and the input is quantized
    once. For inference.

    Attributes:
        inputs: a layer of no outputs that quantizes the input.
        weight: int8 [outputs, inputs], or [outputs, inputs / 2] with two integers a byte.
        weight_scale: float32 [groups, outputs].
        weight_zero_point: int8 [groups, outputs], or None where the weights are symmetric.
        weight_sums: int32 [groups, outputs], sums of the weights less their zero points, or None where the activations
            are symmetric.
        bias: float32 [outputs], or None.
    """

    SCALES = ("weight_scale", "bias")

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_sums: Tensor | None
    bias: Tensor | None

    def __init__(self, layers: Sequence[QuantizedLinear], *, halves: bool) -> None:
        """Take over the integers of layers that quantize their input alike.

        Args:
            layers: at least one, with as many groups each.
            halves: keep two weights a byte, which then have 4 bits at most and an even number of inputs.
        """
        super().__init__()
        self.inputs = layers[0].without_outputs()
        self.halves = halves
        weight = torch.cat([layer.weight for layer in layers])
        scale = torch.cat([layer.weight_scale for layer in layers if layer.weight_scale is not None])
        zero_points = [layer.weight_zero_point for layer in layers if layer.weight_zero_point is not None]
        zero_point = torch.cat(zero_points) if zero_points else None
        biases = [layer.bias for layer in layers if layer.bias is not None]
        groups = scale.shape[1]
        sums = split_groups(weight, groups).sum(-1, dtype=torch.int32)  # [outputs, groups]
        if zero_point is not None:
            sums -= zero_point.int() * (weight.shape[1] // groups)
        self.register_buffer("weight", pack_halves(weight) if halves else weight)
        self.register_buffer("weight_scale", scale.t().contiguous())
        self.register_buffer("weight_zero_point", None if zero_point is None else zero_point.t().contiguous())
        self.register_buffer("weight_sums", None if self.inputs.activation_symmetric else sums.t().contiguous())
        self.register_buffer("bias", torch.cat(biases).float() if biases else None)

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return the layers' outputs, one after the other, in the type of `x`."""
        left, scale, zero_point = self._quantized(x)
        # In place, for a new tensor of so many numbers costs as much as the arithmetic on it.
        scaled = self._accumulated(left, zero_point).float().mul_(self.weight_scale.unsqueeze(1))
        if scale.shape[1] == 1:
            output = (scaled[0] if len(scaled) == 1 else scaled.sum(0)).mul_(scale)
        else:
            output = scaled.mul_(scale.t().unsqueeze(-1)).sum(0)
        if self.bias is not None:
            output = output.add_(self.bias)
        return output.to(x.dtype).reshape(*x.shape[:-1], -1)

    def accumulators(self, x: Float[Tensor, "*tokens inputs"]) -> Int32[Tensor, "groups _ outputs"]:
        """Return the exact sums of integer products, less zero points, for all tokens."""
        left, _, zero_point = self._quantized(x)
        return self._accumulated(left, zero_point)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        groups, outputs = self.weight_scale.shape
        stored = "two weights a byte" if self.halves else "one weight a byte"
        return f"{self.inputs.in_features}, {outputs}, {stored}, groups={groups}"

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return integers [tokens, inputs], and scale and zero point [tokens or 1, groups or 1]."""
        integers, scale, zero_point = self.inputs.input_integers(x)
        left = integers.reshape(-1, self.inputs.in_features)
        groups = scale.shape[-1]
        return left, scale.reshape(-1, groups), None if zero_point is None else zero_point.reshape(-1, groups)

    def _accumulated(self, left: Tensor, zero_point: Tensor | None) -> Tensor:
        product = grouped_product(left, self.weight, len(self.weight_scale), halves=self.halves)
        if zero_point is None and self.weight_zero_point is None:
            return product
        return correct_zero_points(product, left, zero_point, self.weight_sums, self.weight_zero_point)
