"""Frozen linear layers of bitsandbytes that compute one function, trained or not. Imported where it is installed only.

On a CPU, bitsandbytes 0.50 computes something else once a layer is in evaluation mode: its layer of 8 bits rounds
inputs to 8 bits too (0.7 % of the output), and its layer of 4 bits repacks its weights for a kernel in bfloat16 that
has no gradient, so that training cannot go on after a validation. Both stay in training mode here; neither has dropout.
"""

from typing import Self, final

import bitsandbytes
from jaxtyping import Float
from torch import Tensor, nn

from sparq.adaptation.settings import Base


@final
class FrozenInt8(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
    """y = x (scale W_int)^T + bias, with one scale a row: max|row| / 127."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in training mode."""
        super().train(True)
        return self

    def init_8bit_state(self) -> None:
        """Take over integers and scales from the weights, once more after they were moved."""
        # Moving them again, as PEFT does for DoRA, forgets the scales: then the state still has them.
        self.state.CB, self.state.SCB = self.weight.CB, self._scale.to(self.weight.device)
        self.weight.CB, self.weight.SCB = None, None

    @property
    def _scale(self) -> Tensor:
        scale: Tensor = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        return scale

    def dequantized(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weights that the layer computes with, in float32."""
        weight: Tensor = self.weight.data.float() * (self._scale.unsqueeze(1) * (1.0 / 127.0))
        return weight


@final
class FrozenNF4(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """y = x W^T + bias, with W = scale code[index]: 16 quantiles of a normal distribution, a scale every 64 weights."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in training mode."""
        super().train(True)
        return self

    def dequantized(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weights that the layer computes with, in float32."""
        weight: Tensor = bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight.float()


def frozen_linear(
    weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None, base: Base
) -> FrozenInt8 | FrozenNF4:
    """Return a layer with these weights rounded to the nearest that `base` can keep."""
    outputs, inputs = weight.shape
    options = {"bias": bias is not None, "device": "meta"}
    layer: FrozenInt8 | FrozenNF4
    # Parameters of bitsandbytes quantize as they are moved; those of 8 bits only from a CPU.
    if base == "int8":
        layer = FrozenInt8(inputs, outputs, has_fp16_weights=False, **options)
        data = weight.detach().float().cpu()
        parameter = bitsandbytes.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = FrozenNF4(inputs, outputs, quant_type="nf4", **options)
        parameter = bitsandbytes.nn.Params4bit(
            weight.detach().float(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=base == "nf4-double",
            module=layer,
        )
    layer.weight = parameter.to(weight.device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
