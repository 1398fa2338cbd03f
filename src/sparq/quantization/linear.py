"""A linear layer with integer weights that quantizes its input at run time, simulated in floating point."""

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from torch.nn import functional

from sparq.quantization.grid import Grid, nearest
from sparq.quantization.hadamard import apply_hadamard
from sparq.quantization.products import integer_accumulators
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

_SETTINGS = (
    "activation_bits", "activation_symmetric", "activation_granularity", "activation_group_size", "activation_clip",
    "hadamard",
)  # fmt: skip


@final
class QuantizedLinear(KeepsScales):
    """y = D_x(Q_x((x / input_scale) M H)) D_w(W)^T + x A^T B^T + bias, with Q to integers and D back from them.

    The weights are held as integers. The input is quantized at run time, with one scale a token, a group of its
    channels or a tensor, or with the fixed one of `activation_scale`.
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
        activation_scale: float32 [1], the fixed scale of quantized inputs; None for scales at run time.
        activation_zero_point: int8 [1], its zero point; None where inputs are symmetric.
        low_rank_a: [rank, in_features], A; None where nothing of low rank is added.
        low_rank_b: [out_features, rank], B.
        hadamard: whether the input is multiplied by a Hadamard matrix H at run time, else H is the identity.
    """

    SCALES = ("weight_scale", "input_scale", "input_matrix", "activation_scale")

    weight: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_matrix: Tensor | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    low_rank_a: Tensor | None
    low_rank_b: Tensor | None

    def __init__(
        self,
        *,
        weight: Int8[Tensor, "outputs inputs"] | Float[Tensor, "outputs inputs"],
        weight_scale: Float[Tensor, "outputs groups"] | None = None,
        weight_zero_point: Int8[Tensor, "outputs groups"] | None = None,
        bias: Float[Tensor, " outputs"] | None = None,
        input_scale: Float[Tensor, " inputs"] | None = None,
        input_matrix: Float[Tensor, "inputs inputs"] | None = None,
        activation_scale: Float[Tensor, " 1"] | None = None,
        activation_zero_point: Int8[Tensor, " 1"] | None = None,
        low_rank_a: Float[Tensor, "rank inputs"] | None = None,
        low_rank_b: Float[Tensor, "outputs rank"] | None = None,
        activation_bits: int,
        activation_symmetric: bool = True,
        activation_granularity: Granularity = "token",
        activation_group_size: int | None = None,
        activation_clip: float = 1.0,
        hadamard: bool = False,
    ) -> None:
        super().__init__()
        assert weight.is_floating_point() == (weight_scale is None), "integer weights, and only those, have a scale"
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.activation_symmetric = activation_symmetric
        self.activation_granularity = activation_granularity
        self.activation_group_size = activation_group_size
        self.activation_clip = activation_clip
        self.hadamard = hadamard
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", weight_zero_point)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_matrix", input_matrix)
        self.register_buffer("activation_scale", activation_scale)
        self.register_buffer("activation_zero_point", activation_zero_point)
        self.register_buffer("low_rank_a", low_rank_a)
        self.register_buffer("low_rank_b", low_rank_b)
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
            **activation_settings(scheme),
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

    def rounded(
        self,
        grid: Grid,
        integers: Int8[Tensor, "outputs inputs"],
        low_rank: tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"]] | None = None,
    ) -> "QuantizedLinear":
        """Return the layer with integers of a grid for its weights, whatever they were, and A and B beside them."""
        first, second = low_rank or (None, None)
        return QuantizedLinear(
            weight=integers,
            weight_scale=grid.scale,
            weight_zero_point=grid.zero_point,
            bias=self.bias,
            input_scale=self.input_scale,
            input_matrix=self.input_matrix,
            activation_scale=self.activation_scale,
            activation_zero_point=self.activation_zero_point,
            low_rank_a=first,
            low_rank_b=second,
            **{name: getattr(self, name) for name in _SETTINGS},
        )

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return the layer's output in the type of `x`."""
        weight = self.dense_weight()
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return self._with_low_rank(functional.linear(self.seen(x).to(weight.dtype), weight, bias).to(x.dtype), x)

    def seen(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens inputs"]:
        """Return what the product sees of the input: transformed, quantized and dequantized.

        With ranges of run time the gradient passes through the rounding as through the identity.
        """
        inputs = self.transformed(x)
        if self.activation_bits == FLOAT_BITS:
            return inputs
        if self.activation_scale is not None:
            return dequantize(*self._fixed_integers(inputs)).view(x.shape)
        with torch.no_grad():
            quantized = fake_quantize(
                self._rows(inputs), self.activation_bits, symmetric=self.activation_symmetric, clip=self.activation_clip
            ).reshape(x.shape)
        return pass_through(inputs, quantized)

    def integer_forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        """Return, in float64, what exact integer arithmetic gives: slow, the reference for `forward`.

            y[t, o] = bias[o] + sum over g of scale_x[t, g] * scale_w[o, g] * accumulator[t, o, g]

        to which what is of low rank is added.

        Both weights and activations must be quantized.
        """
        assert self.weight_scale is not None, "the weights are not integers"
        scale = self.input_integers(x)[1].double()
        scale = scale.reshape(-1, 1, scale.shape[-1])  # [tokens or 1, 1, groups or 1]
        output = (self.accumulators(x) * self.weight_scale.double() * scale).sum(-1)
        if self.bias is not None:
            output = output + self.bias
        return self._with_low_rank(output.reshape(*x.shape[:-1], self.out_features), x)

    def accumulators(self, x: Float[Tensor, "*tokens inputs"]) -> Int[Tensor, "_ outputs groups"]:
        """Return the exact sums of integer products, less zero points, for all tokens; slow, a reference.

        Both weights and activations must be quantized.
        """
        assert self.weight_scale is not None, "the weights are not integers"
        assert self.activation_bits != FLOAT_BITS, "the activations are not integers"
        integers, scale, zero_point = self.input_integers(x)
        left = split_groups(integers.int(), scale.shape[-1])
        left = left if zero_point is None else left - zero_point.unsqueeze(-1)
        left = left.reshape(-1, self.in_features)  # [tokens, inputs]
        groups = self.weight_scale.shape[1]
        right = split_groups(self.weight.int(), groups)
        if self.weight_zero_point is not None:
            right = right - self.weight_zero_point.unsqueeze(-1)
        return integer_accumulators(split_groups(left, groups), right)

    def input_integers(
        self, x: Float[Tensor, "*tokens inputs"]
    ) -> tuple[Int8[Tensor, "*rows columns"], Float[Tensor, "*rows groups"], Int8[Tensor, "*rows groups"] | None]:
        """Return the integers that the product sees, their scale, and their zero point where they have one.

        With one scale for the whole tensor there is one row, else one a token.
        """
        inputs = self.transformed(x)
        if self.activation_scale is not None:
            return self._fixed_integers(inputs)
        whole = self.activation_granularity == "tensor"
        rows = inputs.reshape(1, -1) if whole else inputs
        size = self.activation_group_size
        if self.activation_symmetric:
            return *quantize_symmetric(rows, self.activation_bits, size, clip=self.activation_clip), None
        return quantize_asymmetric(rows, self.activation_bits, size, clip=self.activation_clip)

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

    def transformed(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens inputs"]:
        """Return the input after division, matrix and Hadamard transform, ahead of quantization."""
        x = x if self.input_scale is None else x / self.input_scale
        x = x if self.input_matrix is None else x @ self.input_matrix.to(x.dtype)
        return apply_hadamard(x) if self.hadamard else x

    def _with_low_rank(self, output: Tensor, x: Tensor) -> Tensor:
        if self.low_rank_a is None or self.low_rank_b is None:
            return output
        dtype = self.low_rank_a.dtype
        added = functional.linear(functional.linear(x.to(dtype), self.low_rank_a), self.low_rank_b)
        return output + added.to(output.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        if self.activation_granularity == "tensor":
            return x.reshape(1, -1)
        size = self.activation_group_size
        return x if size is None else split_groups(x, x.shape[-1] // size)

    def _fixed_integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return integers, scale and zero point of `activation_scale`, as one row."""
        scale, zero_point = self.activation_scale, self.activation_zero_point
        assert scale is not None
        offset = None if zero_point is None else zero_point.float()
        integers = nearest(x.float(), scale, offset, self.activation_bits).to(torch.int8).reshape(1, -1)
        return integers, scale[None], None if zero_point is None else zero_point[None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsScales:
        self._dense = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)


def activation_settings(scheme: QuantizationScheme) -> dict[str, Any]:
    """Return how a scheme quantizes inputs, as arguments of `QuantizedLinear`."""
    grouped = scheme.activation_granularity == "group"
    return {
        "activation_bits": scheme.activation_bits,
        "activation_symmetric": scheme.activation_symmetric,
        # Channels are divided by `input_scale`; the rest of it is one fixed range.
        "activation_granularity": "tensor" if scheme.activation_static else scheme.activation_granularity,
        "activation_group_size": scheme.group_size if grouped else None,
        "activation_clip": scheme.activation_clip,
    }
