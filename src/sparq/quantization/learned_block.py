"""One decoder block with learnable clipping and equivalent changes, as OmniQuant and AffineQuant train it.

The block's own modules compute; what they take their weights, biases and norms from is replaced for each call, so
that a gradient reaches the changes and the clipping. When training ends, the same tensors become the quantized block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from sparq.models.families import Family
from sparq.quantization.equivalence import Change
from sparq.quantization.grid import Grid
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme
from sparq.quantization.straight_through import WIDE, in_groups, learned_range, quantize_through


class _Simulated(nn.Module):
    """A linear layer whose input is quantized with a gradient; weight and bias are given anew at every call."""

    weight: Tensor
    bias: Tensor
    divisor: Tensor
    matrix: Tensor

    def __init__(self, linear: nn.Linear, scheme: QuantizationScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", self.weight.new_zeros(linear.out_features))
        self.register_buffer("divisor", self.weight.new_ones(linear.in_features, dtype=torch.float32))
        self.register_buffer("matrix", self.weight.new_zeros(0, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens outputs"]:
        scheme = self.scheme
        x = x / self.divisor
        if self.matrix.numel():
            x = x @ self.matrix
        if scheme.activation_bits != FLOAT_BITS:
            x = quantize_through(
                self._rows(x), scheme.activation_bits, symmetric=scheme.activation_symmetric,
                low_share=scheme.activation_clip, high_share=scheme.activation_clip,
            ).view(x.shape)  # fmt: skip
        return functional.linear(x, self.weight, self.bias)

    def _rows(self, x: Tensor) -> Tensor:
        """Return the values that share a range as rows."""
        if self.scheme.activation_granularity == "tensor":
            return x.reshape(1, -1)
        return in_groups(x, self.scheme.group_size) if self.scheme.activation_granularity == "group" else x


class LearnedBlock(nn.Module):
    """The learnable parameters of one block, and the block computed with them.

    Args:
        block: the float block; its linear layers are replaced by simulated ones until `finish`.
        family: where its parts are.
        scheme: bits, groups, and how inputs are quantized.
        changes: the junctions of the block with where their changes start.
    """

    def __init__(self, block: nn.Module, family: Family, scheme: QuantizationScheme, changes: list[Change]) -> None:
        super().__init__()
        self.family, self.scheme = family, scheme
        self.changes = nn.ModuleList(changes)
        # Not submodules: their own parameters are not learned.
        self._block = (block,)
        self._linears: dict[str, nn.Linear] = {}
        self.low, self.high = nn.ParameterDict(), nn.ParameterDict()
        for name in family.linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._linears[name] = linear
            if scheme.weight_bits != FLOAT_BITS:
                groups = linear.in_features // (scheme.group_size or linear.in_features)
                for shares in (self.low, self.high):
                    wide = linear.weight.new_full((linear.out_features, groups, 1), WIDE, dtype=torch.float32)
                    shares[name.replace(".", "/")] = nn.Parameter(wide)
            block.set_submodule(name, _Simulated(linear, scheme))

    @property
    def block(self) -> nn.Module:
        """The block that computes."""
        return self._block[0]

    def forward(self, states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the block's output on hidden states."""
        result = functional_call(self.block, self._tensors(), (states, *args), dict(kwargs))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _changed(self) -> tuple[dict[str, Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
        """Return every linear layer's weight and bias after the changes, and what else is replaced."""
        weights: dict[str, Tensor] = {name: linear.weight.detach().float() for name, linear in self._linears.items()}
        biases: dict[str, Tensor | None] = {
            name: None if linear.bias is None else linear.bias.detach().float()
            for name, linear in self._linears.items()
        }
        other: dict[str, Tensor] = {}
        for change in self.changes:
            assert isinstance(change, Change)
            junction = change.junction
            for name in junction.readers:
                moved = change.moved(weights[name])
                if moved is not None:
                    before = biases[name]
                    biases[name] = moved if before is None else before + moved
                weights[name] = change.change_reader(weights[name])
            if junction.maker in weights:
                bias = biases[junction.maker]
                weights[junction.maker] = change.change_value(weights[junction.maker])
                if bias is not None or change.shift is not None:
                    bias = torch.zeros_like(change.scale()) if bias is None else bias
                    biases[junction.maker] = change.change_offset(bias)
            elif junction.whole:
                inverse = torch.linalg.inv(change.matrix()[0].double()).float()
                other.update({f"{name}.matrix": inverse for name in junction.readers})
            elif junction.folds:
                norm: Any = self.block.get_submodule(junction.maker)
                other[f"{junction.maker}.weight"] = norm.weight.detach().float() / change.scale()
                if getattr(norm, "bias", None) is not None:
                    other[f"{junction.maker}.bias"] = change.change_offset(norm.bias.detach().float())
            else:
                other.update({f"{name}.divisor": change.scale() for name in junction.readers})
        return weights, biases, other

    def _tensors(self) -> dict[str, Tensor]:
        weights, biases, tensors = self._changed()
        for name, weight in weights.items():
            if self.scheme.weight_bits != FLOAT_BITS:
                weight = quantize_through(
                    in_groups(weight, self.scheme.group_size), self.scheme.weight_bits,
                    symmetric=self.scheme.weight_symmetric, **self._shares(name),
                ).view(weight.shape)  # fmt: skip
            tensors[f"{name}.weight"] = weight
            bias = biases[name]
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors

    def _shares(self, name: str) -> dict[str, Tensor]:
        key = name.replace(".", "/")
        return {"low_share": self.low[key].sigmoid(), "high_share": self.high[key].sigmoid()}

    @torch.no_grad()
    def finish(self) -> None:
        """Put the quantized linear layers and the changed norms into the block, in place."""
        weights, biases, other = self._changed()
        for name, linear in self._linears.items():
            bias = biases[name]
            result = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None)
            result.weight = nn.Parameter(weights[name])
            if bias is not None:
                result.bias = nn.Parameter(bias.to(linear.weight.dtype))
            divisor, matrix = other.pop(f"{name}.divisor", None), other.pop(f"{name}.matrix", None)
            layer = QuantizedLinear.floating(result, self.scheme)
            layer.input_scale, layer.input_matrix = divisor, matrix
            if self.scheme.weight_bits != FLOAT_BITS:
                scale, offset = learned_range(
                    in_groups(weights[name], self.scheme.group_size), self.scheme.weight_bits,
                    symmetric=self.scheme.weight_symmetric, **self._shares(name),
                )  # fmt: skip
                zero_point = None if offset is None else offset.squeeze(-1).to(torch.int8)
                grid = Grid(scale=scale.squeeze(-1), zero_point=zero_point, bits=self.scheme.weight_bits)
                layer = layer.rounded(grid, grid.round(weights[name]))
            self.block.set_submodule(name, layer)
        for name, tensor in other.items():
            self.block.get_parameter(name).copy_(tensor)
