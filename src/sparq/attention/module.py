"""The part of a converted attention layer that holds its variant and its weights, and picks a way to compute it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparq.attention.decode import decode_attention
from sparq.attention.fused import as_bias, flash_max_shift_attention, flash_sink_attention, fused_kernel
from sparq.attention.fused_kernel import FusedKernel
from sparq.attention.gate import HeadGate
from sparq.attention.inner_quantizer import InnerQuantizer
from sparq.attention.reference import Mask, reference_attention
from sparq.attention.short_documents import Sink, short_documents_attention
from sparq.attention.spec import AttentionSpec

CHILD = "outlier_free"
"""Name of this module in an attention layer, and so in the names of its weights."""

SHORT = 256
"""Keys up to which training on a CPU writes the probabilities out: the fused backward costs more than it saves there.

SmolLM2-135M, bfloat16, LoRA, batches of 640 tokens, one thread each side by side: 2.4 s an update fused, 1.8 s written
out.
"""


class OutlierFreeAttention(nn.Module):
    """The attention of one layer from its queries, keys and values on.

    Args:
        spec: the variant.
        hidden: width of the layer's input.
        heads: number of query heads.
        head_dim: width of a head.
        like: a tensor of the type and device of the layer.
    """

    def __init__(self, spec: AttentionSpec, *, hidden: int, heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads
        self.recording = False
        """Whether the probabilities are wanted, whatever the caller says."""
        self.sink: nn.Parameter | None
        self.register_parameter("sink", None)
        if spec.normalization == "learned_sink":
            # The pretrained softmax is the limit -inf, from which no gradient leads away; 0 is softmax1.
            self.sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=like.device))
        self.log_weight: Tensor | None
        """Added to the sink's logit while a `SinkSchedule` lasts."""
        self.register_buffer("log_weight", None)
        self.gate = None
        if spec.gate is not None:
            self.gate = HeadGate(spec.gate, hidden=hidden, heads=heads, head_dim=head_dim, like=like)
        self.basis: nn.Module | None = None
        """Makes the gates' input of what the layer is given, where another basis has been chosen for that."""
        self.quantizer: InnerQuantizer | None = None
        """Rounds what the products see; None for a model that is not quantized there."""
        self._gates: Tensor | None = None
        self._asked = False

    def extra_repr(self) -> str:
        """Name the variant in the printed model."""
        return self.spec.name

    def attach(self, layer: nn.Module) -> None:
        """Become a part of an attention layer."""
        layer.add_module(CHILD, self)
        self._hook = layer.register_forward_pre_hook(self.before_layer, with_kwargs=True)

    def detach(self) -> None:
        """Stop reading what the layer is given, ahead of being replaced."""
        self._hook.remove()

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read, ahead of the layer, what its attention function is not told: a forward pre-hook.

        Only the layer sees the hidden states that gates need, and OPT keeps `output_attentions` to itself.
        """
        if self.gate is not None:
            self.take_gates(args[0] if args else kwargs["hidden_states"])
        self._asked = bool(kwargs.get("output_attentions") or getattr(layer.config, "output_attentions", False))

    def take_gates(self, hidden_states: Float[Tensor, "batch queries hidden"]) -> None:
        """Compute the gates of the next output."""
        assert self.gate is not None
        self._gates = self.gate(hidden_states if self.basis is None else self.basis(hidden_states))

    def forward(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Mask | None,
        *,
        scaling: float,
        dropout: float = 0.0,
    ) -> tuple[Float[Tensor, "batch queries heads head_dim"], Float[Tensor, "batch heads queries keys"] | None]:
        """Compute the output, queries before heads, and the probabilities if they are written out."""
        out, probabilities = self.attend(query, key, value, mask, scaling=scaling, dropout=dropout)
        return self.gated(out), probabilities

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, *, scaling: float, dropout: float = 0.0
    ) -> tuple[Float[Tensor, "batch queries heads head_dim"], Float[Tensor, "batch heads queries keys"] | None]:
        """Do the same ahead of the gates."""
        if self.writes_out(query, key, dropout):
            return reference_attention(
                query, key, value, mask, spec=self.spec, scaling=scaling, sink=self.logit, dropout=dropout,
                quantizer=self.quantizer,
            )  # fmt: skip
        assert not self.is_softmax, "attention_forward leaves the pretrained function to transformers"
        if query.shape[2] == 1:
            bias = None if mask is None else as_bias(mask, query.dtype)
            out = decode_attention(query, key, value, bias, self.logit, spec=self.spec, scaling=scaling)
        else:
            out = self._fused(query, key, value, mask, scaling)
        return out.transpose(1, 2), None

    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: FusedKernel, *, scaling: float
    ) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Do the same with a kernel that knows where documents begin; `has_sink_kernel` must be true."""
        sink = self.logit
        if self.is_softmax:
            sink = torch.full((self.heads,), float("-inf"), device=query.device)
        out = flash_sink_attention(query, key, value, None, sink, is_causal=True, scaling=scaling, kernel=kernel)
        return out.transpose(1, 2)

    def attend_short(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scaling: float
    ) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Do the same for short documents on a CPU; `has_sink_kernel` or `has_maximum` must be true."""
        sink: Sink = "none"
        if self.has_maximum:
            sink = "maximum"
        elif not self.is_softmax:
            logit = self.logit
            sink = query.new_zeros(self.heads) if logit is None else logit
        return short_documents_attention(query, key, value, sink, lengths, scaling=scaling)

    @property
    def logit(self) -> Float[Tensor, " heads"] | None:
        """The logit of each head's sink; None is that of the variant."""
        if self.log_weight is None:
            return self.sink
        return self.log_weight if self.sink is None else self.sink + self.log_weight

    @property
    def is_softmax(self) -> bool:
        """Whether the probabilities are those of the pretrained model."""
        return self.spec.normalization == "vanilla" and self.spec.clip is None

    @property
    def has_sink_kernel(self) -> bool:
        """Whether it is a plain softmax with a sink, or with none."""
        if self._rounds_probabilities:
            return False
        return self.spec.clip is None and self.spec.normalization in ("vanilla", "softmax1", "learned_sink")

    @property
    def has_maximum(self) -> bool:
        """Whether its sink is the row's maximum."""
        if self._rounds_probabilities:
            return False
        return self.spec.clip is None and self.spec.normalization == "max_shift"

    @property
    def _rounds_probabilities(self) -> bool:
        return self.quantizer is not None and self.quantizer.writes_out

    @property
    def shows(self) -> bool:
        """Whether somebody wants the probabilities."""
        return self.recording or self._asked

    def writes_out(self, query: Tensor, key: Tensor, dropout: float) -> bool:
        """Tell whether the probabilities are written out: they are asked for, it is faster, or no kernel can do it."""
        if self.shows or self._rounds_probabilities:
            return True
        if torch.is_grad_enabled() and key.shape[2] <= SHORT and key.device.type == "cpu":
            return True
        if self.is_softmax:
            return False
        if dropout > 0:
            return True
        if query.shape[2] == 1:
            return torch.is_grad_enabled()
        fusible = self.spec.clip is None and self.spec.normalization in ("softmax1", "learned_sink", "max_shift")
        return not fusible or fused_kernel(query, masked=True) is None

    def gated(
        self, output: Float[Tensor, "batch queries heads head_dim"]
    ) -> Float[Tensor, "batch queries heads head_dim"]:
        """Apply the gates that `before_layer` computed, if there are any."""
        if self._gates is None:
            return output
        gates, self._gates = self._gates, None
        return output * gates.to(output.dtype)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        queries = query.shape[2]
        is_causal = mask is None
        if is_causal:
            key, value = key[:, :, :queries], value[:, :, :queries]
        if self.spec.normalization == "max_shift":
            return flash_max_shift_attention(query, key, value, mask, is_causal=is_causal, scaling=scaling)
        return flash_sink_attention(query, key, value, mask, self.logit, is_causal=is_causal, scaling=scaling)
