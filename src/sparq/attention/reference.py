"""Attention with its probabilities written out: every variant, any mask, quadratic memory."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparq.attention.inner_quantizer import InnerQuantizer
from sparq.attention.probabilities import attention_probabilities
from sparq.attention.spec import AttentionSpec

Mask = Bool[Tensor, "#batch #heads queries keys"] | Float[Tensor, "#batch #heads queries keys"]
"""True where a query may see a key; or numbers to add to the scores, the lowest of their type where it may not."""


def reference_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Mask | None,
    *,
    spec: AttentionSpec,
    scaling: float,
    sink: Float[Tensor, " heads"] | None = None,
    dropout: float = 0.0,
    quantizer: InnerQuantizer | None = None,
) -> tuple[Float[Tensor, "batch queries heads head_dim"], Float[Tensor, "batch heads queries keys"]]:
    """Compute attention, in float32 (or wider) between the two products.

    Without a mask a query sees the keys up to its own position, as many as there are queries; a single query sees all.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        mask: what a query may see; None is causal.
        spec: the variant; its gate is not applied here.
        scaling: factor on the query-key products.
        sink: logit of each head's sink.
        dropout: rate of dropped probabilities.
        quantizer: rounds the probabilities; None for not. Queries, keys and values are taken as they are.

    Returns:
        The output, queries before heads as transformers wants it, and the probabilities.
    """
    batch, heads, queries, head_dim = query.shape
    groups = heads // key.shape[1]
    if mask is None and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    keys = key.shape[2]
    # A group of query heads shares its keys: folded into the rows, no key is copied.
    # [batch kv_heads groups*queries head_dim]
    rows = (query * scaling).reshape(batch, heads // groups, groups * queries, head_dim)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, heads, queries, keys)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    allowed = mask
    if mask is not None and mask.dtype != torch.bool:
        allowed = may_see(mask)
        scores = scores + mask.masked_fill(~allowed, 0.0)
    probabilities = attention_probabilities(
        scores, allowed, spec.normalization, sink=None if sink is None else sink.view(-1, 1, 1), clip=spec.clip
    )
    if quantizer is not None:
        probabilities = quantizer.probabilities(probabilities)
    probabilities = probabilities.to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=dropout > 0)
    output = torch.matmul(probabilities.view(batch, heads // groups, groups * queries, keys), value)
    # [batch heads queries head_dim] -> [batch queries heads head_dim]
    return output.view(batch, heads, queries, head_dim).transpose(1, 2).contiguous(), probabilities


def may_see(mask: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Read an additive mask as a boolean one; transformers writes the lowest number of the type, others -inf."""
    # Half of the lowest: masks that were added up, or went through another type, are forbidden all the same.
    return mask > torch.finfo(mask.dtype).min / 2
