"""Quantization inside of the attention: queries, keys, values (the KV cache) and probabilities.

Queries, keys and values have one scale and zero point a token and head, or one for every few channels of it. A key or
value is rounded on its own, whatever stands beside it, so rounding the cache at every step, as here, and rounding each
token once as it enters the cache are the same, bit for bit, for caches that grow and caches of fixed size.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparq.attention import IMPLEMENTATION
from sparq.attention.inner_quantizer import Inputs
from sparq.errors import SparqError
from sparq.models.conversion import convert, converted_layers
from sparq.quantization.hadamard import apply_hadamard
from sparq.quantization.quantizer import fake_quantize, split_groups
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme

_PLAIN = ("eager", "sdpa")
"""Attentions of transformers that `vanilla` of this package computes too."""


@dataclass(frozen=True, kw_only=True)
class AttentionQuantizer:
    """Rounds what goes into the two products, in simulation; follows `sparq.attention`'s `InnerQuantizer`.

    Attributes:
        query_bits: 2 to 8, or 16 for as they are; so are the others.
        key_bits: of the keys, after the rotary embedding.
        value_bits: of the values.
        probability_bits: of the probabilities, on the integers from 0 to 2^bits - 1 for the range from 0 to 1.
        group_size: channels of a head that share a scale; None is the whole head.
        rotates: multiply queries and keys by a Hadamard matrix first, which leaves their products as they are and
            spreads a key's large channels (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 4, stage 2c).
    """

    query_bits: int = FLOAT_BITS
    key_bits: int = FLOAT_BITS
    value_bits: int = FLOAT_BITS
    probability_bits: int = FLOAT_BITS
    group_size: int | None = None
    rotates: bool = False

    @property
    def writes_out(self) -> bool:
        """Whether the probabilities have to be there."""
        return self.probability_bits != FLOAT_BITS

    def inputs(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
    ) -> Inputs:
        """Return queries, keys and values, rotated and rounded, in their types."""
        if self.rotates:
            query, key = apply_hadamard(query), apply_hadamard(key)
        return (
            self._rounded(query, self.query_bits),
            self._rounded(key, self.key_bits),
            self._rounded(value, self.value_bits),
        )

    def probabilities(
        self, probabilities: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Return round(p (2^bits - 1)) / (2^bits - 1)."""
        if self.probability_bits == FLOAT_BITS:
            return probabilities
        steps = int(2**self.probability_bits - 1)
        return (probabilities * steps).round_().div_(steps)

    def _rounded(self, x: Tensor, bits: int) -> Tensor:
        if bits == FLOAT_BITS:
            return x
        groups = x.shape[-1] // (self.group_size or x.shape[-1])
        rounded = fake_quantize(split_groups(x, groups), bits, symmetric=False)
        return rounded.reshape_as(x).to(x.dtype)


def quantize_attention(model: PreTrainedModel, scheme: QuantizationScheme) -> None:
    """Let a model's attention round what the scheme says, in place; nothing if it says nothing.

    A model with transformers' own attention is converted to `vanilla`, the same function, first.

    Raises:
        SparqError: the attention is another one, into which nothing can be put.
    """
    if not scheme.quantizes_attention:
        return
    if not converted_layers(model):
        check_attention(model, scheme)
        convert(model, "vanilla")
    quantizer = AttentionQuantizer(
        query_bits=scheme.query_bits,
        key_bits=scheme.key_bits,
        value_bits=scheme.value_bits,
        probability_bits=scheme.probability_bits,
        group_size=scheme.attention_group_size,
        rotates=scheme.key_rotation and min(scheme.query_bits, scheme.key_bits) != FLOAT_BITS,
    )
    for layer in converted_layers(model):
        layer.quantizer = quantizer


def check_attention(model: PreTrainedModel, scheme: QuantizationScheme) -> None:
    """Check that a scheme fits a model's attention.

    Raises:
        SparqError: it does not; the message says why.
    """
    if not scheme.quantizes_attention:
        return
    name = model.config._attn_implementation
    if name != IMPLEMENTATION and name not in _PLAIN:
        raise SparqError(
            f"attention {name!r} cannot be quantized: call model.set_attn_implementation('sdpa') or sparq.convert first"
        )
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if scheme.attention_group_size and head_dim % scheme.attention_group_size:
        raise SparqError(
            f"attention_group_size {scheme.attention_group_size} does not divide the {head_dim} channels of a head"
        )
