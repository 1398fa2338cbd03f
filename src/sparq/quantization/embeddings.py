"""The embedding and the head with small weights: a third of a small model's file."""

from typing import final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.products import pack_halves, unpack_halves
from sparq.quantization.quantizer import dequantize, quantize_symmetric
from sparq.quantization.scales import KeepsScales
from sparq.quantization.scheme import EMBEDDING_GROUPS, FLOAT_BITS


@final
class QuantizedEmbedding(KeepsScales):
    """The row scale[id] * integers[id] for every token id, in the type of the model.

    Attributes:
        weight: int8 [tokens, channels], or [tokens, channels / 2] with two integers a byte.
        weight_scale: float32 [tokens, groups].
        like: empty; its type is that of the output, and `model.to` changes it as it changes a weight.
        halves: two integers a byte.
    """

    SCALES = ("weight_scale",)

    weight: Tensor
    weight_scale: Tensor
    like: Tensor

    def __init__(
        self,
        weight: Int8[Tensor, "vocabulary _"],
        weight_scale: Float[Tensor, "vocabulary groups"],
        dtype: torch.dtype,
        *,
        halves: bool = False,
    ) -> None:
        super().__init__()
        self.halves = halves
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device))

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch channels"]:
        """Return the rows of the ids."""
        rows = self.weight[ids]
        return dequantize(unpack_halves(rows) if self.halves else rows, self.weight_scale[ids]).to(self.like.dtype)

    def packed(self) -> "QuantizedEmbedding":
        """Return the same embedding with two integers a byte, for integers of at most 4 bits."""
        return QuantizedEmbedding(pack_halves(self.weight), self.weight_scale, self.like.dtype, halves=True)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        tokens, groups = self.weight_scale.shape
        return f"{tokens}, {self.weight.shape[1] * (2 if self.halves else 1)}, groups={groups}"


def quantize_embeddings(model: PreTrainedModel, bits: int) -> None:
    """Round the embedding and the head to the nearest integers, in place; tied ones stay one tensor.

    Args:
        model: a causal LM.
        bits: 5 to 8, with one scale a row, or 4, with one for every 32 channels.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    integers = quantize_symmetric(embedding.weight.detach(), bits, EMBEDDING_GROUPS[bits])
    model.set_input_embeddings(QuantizedEmbedding(*integers, embedding.weight.dtype))
    if head.weight is not embedding.weight:
        integers = quantize_symmetric(head.weight.detach(), bits, EMBEDDING_GROUPS[bits])
    bias = None if head.bias is None else head.bias.detach().clone()
    model.set_output_embeddings(quantized_head(*integers, bias))


def quantized_head(
    weight: Int8[Tensor, "vocabulary channels"],
    weight_scale: Float[Tensor, "vocabulary groups"],
    bias: Float[Tensor, " vocabulary"] | None,
) -> QuantizedLinear:
    """Return a head with integer weights, whose input is not quantized."""
    return QuantizedLinear(weight=weight, weight_scale=weight_scale, bias=bias, activation_bits=FLOAT_BITS)
