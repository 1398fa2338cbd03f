"""The largest score of every row and where it is, block by block, in memory linear in the length."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_BYTES = 4 << 20
"""Scores of one block: about the size of a core's cache."""


@torch.no_grad()
def row_max(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    bias: Float[Tensor, "#batch #heads #queries keys"] | None,
    *,
    is_causal: bool,
    scaling: float,
) -> tuple[Float[Tensor, "batch heads queries"], Int[Tensor, "batch heads queries"]]:
    """Return max(s) of every row, in float32 or wider, and the key that it comes from.

    Blocks are compared in the type of the inputs; the winner's score is then computed anew in float32, because the
    maximum has to fit the float32 log-sum-exp of the flash kernel. A row that sees no key gets 0.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        bias: numbers to add to the scores, -inf where a query may not see a key.
        is_causal: query i sees the keys 0 to i.
        scaling: factor on the query-key products.
    """
    assert scaling > 0, "with another sign the largest product would not be the largest score"
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    size = max(16, _BLOCK_BYTES // (batch * heads * keys * query.element_size()))
    bias = None if bias is None else bias.expand(batch, heads, queries, keys)
    argmax = torch.empty(batch, heads, queries, dtype=torch.long, device=query.device)
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = min(end, keys) if is_causal else keys
        rows = query[:, :, start:end].reshape(batch, kv_heads, groups * (end - start), head_dim)
        # [batch heads block seen]
        scores = torch.matmul(rows, key[:, :, :seen].transpose(2, 3)).view(batch, heads, end - start, seen)
        if bias is not None:
            scores = scores * scaling + bias[:, :, start:end, :seen]
        if is_causal and seen > start:
            future = torch.ones(end - start, seen - start, dtype=torch.bool, device=query.device).triu(1)
            scores[..., start:].masked_fill_(future, float("-inf"))
        argmax[:, :, start:end] = scores.argmax(dim=-1)
    index = argmax.view(batch, kv_heads, groups * queries, 1).expand(-1, -1, -1, head_dim)
    picked = key.gather(2, index).view(batch, heads, queries, head_dim)
    logit = scaling * torch.linalg.vecdot(query.to(wide), picked.to(wide))
    if bias is not None:
        logit = logit + bias.gather(3, argmax.unsqueeze(-1)).squeeze(-1)
        logit = logit.masked_fill(logit == float("-inf"), 0.0)
    return logit, argmax
