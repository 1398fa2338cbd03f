"""A linear layer with integer weights that quantizes its input at run time, simulated in floating point."""

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from torch.nn import functional

from sparq.quantization.grid import Grid
from sparq.quantization.hadamard import apply_hadamard
from sparq.quantization.quantizer import (
    dequantize,
    fake_quantize,
    quantize_asymmetric,
    quantize_symmetric,
    split_groups,
)
from sparq.quantization.scales import KeepsScales
from sparq.quantization.scheme import FLOAT_BITS, Granularity, QuantizationScheme
from sparq.quantization.straight_through import pass_through


@final
class QuantizedLinear(KeepsScales):
    """y = D_x(Q_x((x / input_scale) M H)) D_w(W)^T + bias, with Q to integers and D back from them.

    The weights are held as integers. The input is quantized at run time, with one scale a token or a tensor.
    The product is then computed in float32 with dequantized operands ("fake quantization"), which equals the
    scaled product of the integers up to the rounding of float32; `integer_forward` computes that one. Weights
    of 16 bits are held as they are, and the product is computed in their type.

    A float32 copy of the weights is made at the first use and kept, so that a call costs little more than one
    of `nn.Linear`. It is not part of the state. The layer is for inference: its weights have no gradient.

    Attributes:
        weight: int8 [out_features, in_features], or floating point where they are not quantized.
        weight_scale: float32 [out_features, groups], or None where the weights are not quantized.
        weight_zero_point: int8 [out_features, groups], or None where the weights are symmetric.
        bias: [out_features], or None.
        input_scale: float32 [in_features], divides the input at run time; None divides by nothing.
        input_matrix: float32 [in_features, in_features], M, multiplies the input at run time; None is the identity.
        hadamard: whether the input is multiplied by a Hadamard matrix H at run time, else H is the identity.
    """

    SCALES = ("weight_scale", "input_scale", "input_matrix")

    weight: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_matrix: Tensor | None

    def __init__(
        self,
        *,
        weight: Int8[Tensor, "outputs inputs"] | Float[Tensor, "outputs inputs"],
        weight_scale: Float[Tensor, "outputs groups"] | None = None,
        weight_zero_point: Int8[Tensor, "outputs groups"] | None = None,
        bias: Float[Tensor, " outputs"] | None = None,
        input_scale: Float[Tensor, " inputs"] | None = None,
        input_matrix: Float[Tensor, "inputs inputs"] | None = None,
        activation_bits: int,
        activation_symmetric: bool = True,
        activation_granularity: Granularity = "token",
        activation_clip: float = 1.0,
        hadamard: bool = False,
    ) -> None:
        super().__init__()
        assert weight.is_floating_point() == (weight_scale is None), "integer weights, and only those, have a scale"
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.activation_symmetric = activation_symmetric
        self.activation_granularity = activation_granularity
        self.activation_clip = activation_clip
        self.hadamard = hadamard
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", weight_zero_point)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_matrix", input_matrix)
        self._dense: Tensor | None = None

    @classmethod
    def floating(
        cls,
        linear: nn.Linear,
        scheme: QuantizationScheme,
        *,
        factor: Float[Tensor, " inputs"] | None = None,
        divide_input: bool = False,
        hadamard: bool = False,
    ) -> "QuantizedLinear":
        """Return the layer ahead of rounding: weights in floating point, inputs quantized as the scheme says.

        Args:
            linear: the layer to quantize; it is left as it was.
            scheme: how inputs are quantized.
            factor: multiplies each input feature's column of the weights.
            divide_input: divide the input by `factor` at run time, for a factor that no earlier layer takes
                over.
            hadamard: multiply the weights, and the input at run time, by a Hadamard matrix.
        """
        # What is to be rounded anyway is not rounded to 16 bits first.
        dtype = linear.weight.dtype if scheme.weight_bits == FLOAT_BITS else torch.float32
        weight = linear.weight.detach().to(dtype, copy=True)
        if factor is not None:
            weight = (weight.float() * factor).to(dtype)
        if hadamard:
            weight = apply_hadamard(weight.double()).to(dtype)
        return cls(
            weight=weight,
            bias=None if linear.bias is None else linear.bias.detach().clone(),
            input_scale=factor.clone() if factor is not None and divide_input else None,
            hadamard=hadamard,
            activation_bits=scheme.activation_bits,
            activation_symmetric=scheme.activation_symmetric,
            activation_granularity=scheme.activation_granularity,
            activation_clip=scheme.activation_clip,
        )

    @classmethod
    def round_to_nearest(
        cls,
        linear: nn.Linear,
        scheme: QuantizationScheme,
        *,
        factor: Float[Tensor, " inputs"] | None = None,
        divide_input: bool = False,
        hadamard: bool = False,
    ) -> "QuantizedLinear":
        """Return the layer with the nearest integers for its weights; arguments as in `floating`."""
        layer = cls.floating(linear, scheme, factor=factor, divide_input=divide_input, hadamard=hadamard)
        if scheme.weight_bits == FLOAT_BITS:
            return layer
        grid = scheme.grid(layer.weight)
        return layer.rounded(grid, grid.round(layer.weight))

    def rounded(self, grid: Grid, integers: Int8[Tensor, "outputs inputs"]) -> "QuantizedLinear":
        """Return the layer with integers of a grid for its weights, whatever they were."""
        return QuantizedLinear(
            weight=integers,
            weight_scale=grid.scale,
            weight_zero_point=grid.zero_point,
            bias=self.bias,
            input_scale=self.input_scale,
            input_matrix=self.input_matrix,
            hadamard=self.hadamard,
            activation_bits=self.activation_bits,
            activation_symmetric=self.activation_symmetric,
            activation_granularity=self.activation_granularity,
            activation_clip=self.activation_clip,
        )

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return the layer's output in the type of `x`."""
        weight = self.dense_weight()
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return functional.linear(self.seen(x).to(weight.dtype), weight, bias).to(x.dtype)

    def seen(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens inputs"]:
        """Return what the product sees of the input: transformed, quantized and dequantized.

        The gradient passes through the rounding as through the identity.
        """
        inputs = self._transformed(x)
        if self.activation_bits == FLOAT_BITS:
            return inputs
        with torch.no_grad():
            quantized = fake_quantize(
                self._rows(inputs), self.activation_bits, symmetric=self.activation_symmetric, clip=self.activation_clip
            ).view(x.shape)
        return pass_through(inputs, quantized)

    def integer_forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return, in float64, what exact integer arithmetic gives: slow, the reference for `forward`.

            y[t, o] = bias[o] + scale_x[t] * sum over g of scale_w[o, g] * accumulator[t, o, g]

        Both weights and activations must be quantized.
        """
        assert self.weight_scale is not None, "the weights are not integers"
        scale = self.input_integers(x)[1].double().reshape(-1, 1)
        output = (self.accumulators(x) * self.weight_scale.double()).sum(-1) * scale
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*x.shape[:-1], self.out_features)

    def accumulators(self, x: Float[Tensor, "*tokens inputs"]) -> Int[Tensor, "_ outputs groups"]:
        """Return the exact sums of integer products, less zero points, for all tokens; slow, a reference.

        Both weights and activations must be quantized.
        """
        assert self.weight_scale is not None, "the weights are not integers"
        assert self.activation_bits != FLOAT_BITS, "the activations are not integers"
        integers, _, zero_point = self.input_integers(x)
        left = integers.int() if zero_point is None else integers.int() - zero_point
        left = left.reshape(-1, self.in_features)  # [tokens, inputs]
        groups = self.weight_scale.shape[1]
        right = split_groups(self.weight.int(), groups)
        if self.weight_zero_point is not None:
            right = right - self.weight_zero_point.unsqueeze(-1)
        return integer_accumulators(split_groups(left, groups), right)

    def input_integers(
        self, x: Float[Tensor, "*tokens inputs"]
    ) -> tuple[Int8[Tensor, "*rows columns"], Float[Tensor, "*rows 1"], Int8[Tensor, "*rows 1"] | None]:
        """Return the integers that the product sees, their scale, and their zero point where they have one.

        With one scale for the whole tensor there is one row, else one a token.
        """
        rows = self._rows(self._transformed(x))
        if self.activation_symmetric:
            return *quantize_symmetric(rows, self.activation_bits, clip=self.activation_clip), None
        return quantize_asymmetric(rows, self.activation_bits, clip=self.activation_clip)

    def without_outputs(self) -> "QuantizedLinear":
        """Return the layer with no rows of weights: it treats an input as this one does, and takes no memory."""
        bare = copy.copy(self)
        bare._buffers = dict(self._buffers)
        bare._dense = None
        bare.out_features = 0
        for name in ("weight", "weight_scale", "weight_zero_point", "bias"):
            tensor = getattr(self, name)
            setattr(bare, name, None if tensor is None else tensor[:0].clone())
        return bare

    @torch.no_grad()
    def dense_weight(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weights dequantized to float32, or as they are where they are not quantized."""
        if self.weight_scale is None:
            return self.weight
        if self._dense is None:
            with torch.inference_mode(mode=False):
                self._dense = dequantize(self.weight, self.weight_scale, self.weight_zero_point)
        return self._dense

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        kind = "float" if self.weight_scale is None else f"integer, groups={self.weight_scale.shape[1]}"
        return f"{self.in_features}, {self.out_features}, weight={kind}, activation_bits={self.activation_bits}"

    def _transformed(self, x: Tensor) -> Tensor:
        x = x if self.input_scale is None else x / self.input_scale
        x = x if self.input_matrix is None else x @ self.input_matrix.to(x.dtype)
        return apply_hadamard(x) if self.hadamard else x

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1) if self.activation_granularity == "tensor" else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsScales:
        self._dense = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)


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
