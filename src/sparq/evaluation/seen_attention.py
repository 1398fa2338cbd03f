"""The attention of one layer on one batch, as an observer is shown it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SeenAttention:
    """What one attention layer was given and what it made of it.

    Attributes:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        mask: True where a query may see a key; None is causal.
        scaling: factor on the query-key products.
        probabilities: a row (one query) sums to 1, or to less for `softmax1` and others.
        output: what each head adds up, gated if there are gates; the input of the output projection.
    """

    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys head_dim"]
    mask: Bool[Tensor, "#batch #heads queries keys"] | None
    scaling: float
    probabilities: Float[Tensor, "batch heads queries keys"]
    output: Float[Tensor, "batch queries heads head_dim"]

    def scores(self) -> Float[Tensor, "batch heads queries keys"]:
        """Return the scaled query-key products of all pairs, in float32 or wider."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        return (self.query.to(wide) @ self._of_heads(self.key).to(wide).mT) * self.scaling

    def allowed(self) -> Bool[Tensor, "#batch #heads queries keys"]:
        """Return True where a query may see a key."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.probabilities.shape[2:], dtype=torch.bool, device=self.query.device).tril()[None, None]

    def visible_scores(self) -> Float[Tensor, "batch heads queries keys"]:
        """Return `scores`, -inf where a query may not see a key."""
        return self.scores().masked_fill_(~self.allowed(), -math.inf)

    def values(self) -> Float[Tensor, "batch heads keys head_dim"]:
        """Return the value that each query head reads from each key."""
        return self._of_heads(self.value)

    def _of_heads(self, shared: Float[Tensor, "batch kv_heads keys head_dim"]) -> Tensor:
        return shared.repeat_interleave(self.query.shape[1] // shared.shape[1], dim=1)
