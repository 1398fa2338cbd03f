"""Attention of one query over cached keys: few operations, because their number is what such a step costs.

A sink is one more column of the scores, and the value of its key is 0, so it is left out of the second product. For
`max_shift`, whose logit is the row's own maximum, there is a shorter way: with p = softmax(s), m = max(s) and
Z = sum(exp(s - m)), max(p) is 1 / Z, and the row is p times Z / (1 + Z) = 1 / (1 + max(p)).

On a CPU two products and a softmax are faster here than the flash kernel, which computes one key head a thread.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sparq.attention.spec import AttentionSpec

_INF = float("inf")


def decode_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    bias: Float[Tensor, "#batch #heads 1 keys"] | None,
    sink: Float[Tensor, " heads"] | None,
    *,
    spec: AttentionSpec,
    scaling: float,
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """Compute the attention of one query, without a gradient; its gate is not applied here.

    Scores, and the sink's logit with them, are rounded to the type of the inputs, as in transformers' eager attention,
    and normalized in float32 or wider. A query that may see no key gives 0.

    Args:
        query: one query of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        bias: numbers to add to the scores, -inf where the query may not see a key.
        sink: logit of each head's sink; None is that of the variant.
        spec: the variant.
        scaling: factor on the query-key products.
    """
    batch, kv_heads, keys = key.shape[:3]
    heads, head_dim = query.shape[1], query.shape[3]
    # The query heads of one key head are its rows: keys and values are read once.
    rows = query.reshape(batch * kv_heads, heads // kv_heads, head_dim)
    transposed = key.flatten(0, 1).transpose(1, 2)
    if bias is None:
        scores = torch.bmm(rows * scaling, transposed)
    else:
        added = bias.expand(batch, heads, 1, keys).reshape(*rows.shape[:2], keys)
        scores = torch.baddbmm(added, rows, transposed, alpha=scaling)
    probabilities = _probabilities(scores, sink, spec, masked=bias is not None)
    factor: Tensor | None = None
    if spec.normalization in ("max_shift", "none"):
        over = (
            probabilities.amax(-1, keepdim=True) if spec.normalization == "max_shift" else probabilities.sum(-1, True)
        )
        factor = torch.reciprocal(over.add_(1.0))
    if spec.clip is not None:
        clip = spec.clip
        stretched = probabilities if factor is None else probabilities * factor
        probabilities, factor = ((clip.eta - clip.gamma) * stretched + clip.gamma).clamp_(0.0, 1.0), None
    out = torch.bmm(probabilities.to(value.dtype), value.flatten(0, 1))
    if factor is not None:
        out = out.mul_(factor.to(out.dtype))
    return out.view(batch, heads, 1, head_dim)


def _probabilities(
    scores: Float[Tensor, "rows groups keys"],
    sink: Float[Tensor, " heads"] | None,
    spec: AttentionSpec,
    *,
    masked: bool,
) -> Float[Tensor, "rows groups keys"]:
    """Return softmax with a sink, but exp(s) for `none` and softmax alone for `max_shift`: the rest is a factor."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if spec.normalization == "none":
        return torch.exp(scores.to(wide))
    if spec.normalization in ("vanilla", "vanilla_max_shift", "max_shift"):
        probabilities = torch.softmax(scores, dim=-1, dtype=wide)
        # A softmax over no key at all is NaN.
        return probabilities.masked_fill(scores == -_INF, 0.0) if masked else probabilities
    if spec.normalization == "l1":
        size = scores.to(wide).abs()
        if masked:
            size = size.masked_fill(scores == -_INF, 0.0)
        scores = scores / size.sum(-1, keepdim=True).clamp_(min=torch.finfo(wide).tiny)
    if sink is not None:
        logit = (
            sink.to(scores.dtype)
            .expand(scores.shape[0] * scores.shape[1] // len(sink), -1)
            .reshape(*scores.shape[:2], 1)
        )
    elif spec.normalization == "mean" and masked:
        hidden = scores == -_INF
        count = (~hidden).sum(-1, keepdim=True).clamp_(min=1)
        logit = (scores.to(wide).masked_fill(hidden, 0.0).sum(-1, keepdim=True) / count).to(scores.dtype)
    elif spec.normalization == "mean":
        logit = scores.mean(dim=-1, keepdim=True)
    else:
        logit = scores.new_zeros(*scores.shape[:2], 1)
    return torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1, dtype=wide)[..., :-1]
