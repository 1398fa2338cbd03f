"""The definition of every normalization, written out: the reference that each faster path is tested against."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparq.attention.spec import Clip, Normalization

_INF = float("inf")


def attention_probabilities(
    scores: Float[Tensor, "*batch queries keys"],
    allowed: Bool[Tensor, "*#batch queries keys"] | None,
    normalization: Normalization,
    *,
    sink: Float[Tensor, "*#batch 1 1"] | None = None,
    clip: Clip | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """Normalize each row of scores over the keys that it may see; see `sparq.attention.spec` for the formulas.

    The sum is shifted by max(m, logit of the sink), which changes no value and never overflows (`none` is not shifted,
    that is what it is about). A row that may see no key gives zeros, with zero gradient. Gradients flow through
    the maximum of `max_shift`, the mean of `mean` and the norm of `l1` as the formulas say.

    Args:
        scores: scaled query-key products; computed in the dtype given (pass float32 or wider).
        allowed: True where a query may see a key; None allows all.
        normalization: which one.
        sink: logit of the sink: required by `learned_sink`; replaces the 0 of `softmax1`.
        clip: stretch and clip the probabilities.

    Returns:
        Probabilities. A row sums to 1 for `vanilla`, to less than 1 for most others (its attention mass).
    """
    scores, logit = _scores_and_sink(scores, allowed, normalization, sink)
    row_max = scores.detach().amax(dim=-1, keepdim=True)
    shift = torch.maximum(row_max, logit.detach().to(scores.dtype))
    shift = shift.masked_fill(shift == -_INF, 0.0)
    if normalization == "none":
        shift = torch.zeros_like(shift)
    exponentials = torch.exp(scores - shift)
    total = torch.exp(logit - shift) + exponentials.sum(dim=-1, keepdim=True)
    # 1 only where nothing is allowed, so that 0 / 0 does not arise.
    probabilities = exponentials / (total + (total == 0).to(total.dtype))
    if clip is not None:
        probabilities = ((clip.eta - clip.gamma) * probabilities + clip.gamma).clamp(0.0, 1.0)
    return probabilities


def _scores_and_sink(
    scores: Float[Tensor, "*batch queries keys"],
    allowed: Bool[Tensor, "*#batch queries keys"] | None,
    normalization: Normalization,
    sink: Float[Tensor, "*#batch 1 1"] | None,
) -> tuple[Float[Tensor, "*batch queries keys"], Float[Tensor, "*#batch _ 1"]]:
    """Return the scores, -inf where forbidden, and the logit of the sink, -inf if there is none."""
    seen = scores if allowed is None else scores.masked_fill(~allowed, 0.0)
    if normalization == "l1":
        norm = seen.abs().sum(dim=-1, keepdim=True)
        scores = scores / norm.clamp(min=torch.finfo(scores.dtype).tiny)
    masked = scores if allowed is None else scores.masked_fill(~allowed, -_INF)
    if normalization == "max_shift":
        row_max = masked.amax(dim=-1, keepdim=True)
        return masked, row_max.masked_fill(row_max == -_INF, 0.0)
    if normalization == "mean":
        keys = scores.shape[-1] if allowed is None else allowed.sum(dim=-1, keepdim=True).clamp(min=1)
        return masked, seen.sum(dim=-1, keepdim=True) / keys
    if normalization in ("vanilla", "vanilla_max_shift"):
        return masked, scores.new_full((1,) * scores.ndim, -_INF)
    if sink is not None:
        return masked, sink.to(scores.dtype)
    assert normalization != "learned_sink", "a learned sink has a logit"
    return masked, scores.new_zeros((1,) * scores.ndim)
