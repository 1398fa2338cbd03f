"""The attention normalizations, one definition each: the reference that every faster path is tested against.

Let s be one row of scores over the keys that it may see, m = max(s) and Z = sum(exp(s - m)).

| variant     | formula                               | as softmax times a factor           | a sink of value 0 |
|-------------|---------------------------------------|-------------------------------------|-------------------|
| `vanilla`   | exp(s) / sum(exp(s))                  | softmax(s)                          | none              |
| `softmax1`  | exp(s) / (1 + sum(exp(s)))            | softmax(s) * sigmoid(m + log(Z))    | with logit 0      |
| `max_shift` | exp(s - m) / (1 + sum(exp(s - m)))    | softmax(s) * Z / (1 + Z)            | with logit m      |

`softmax1` is Miller (2023) and Hu et al. (2024a), exactly; `max_shift` is SpARQ equation 3.2 read literally. Both
papers call theirs Softmax_1, and both speak of subtracting the maximum, but only in the first does that leave the value
as it is: `max_shift` can never give a row less than half of its mass, so it has no true no-op.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparq.errors import unknown

AttentionVariant = Literal["vanilla", "softmax1", "max_shift"]

ATTENTION_VARIANTS: tuple[AttentionVariant, ...] = get_args(AttentionVariant)


def check_variant(name: str) -> AttentionVariant:
    """Return `name` as a variant.

    Raises:
        SparqError: there is none of that name.
    """
    if name not in ATTENTION_VARIANTS:
        raise unknown("attention", name, ATTENTION_VARIANTS)
    return name


def attention_probabilities(
    scores: Float[Tensor, "*batch queries keys"],
    allowed: Bool[Tensor, "*#batch queries keys"] | None,
    variant: AttentionVariant,
) -> Float[Tensor, "*batch queries keys"]:
    """Normalize each row of scores over the keys that it may see.

    The sum is shifted by max(m, sink logit), which changes no value and never overflows. A row that may see no key
    gives zeros, with zero gradient. The gradient of `max_shift` flows through the maximum as the formula says.

    Args:
        scores: scaled query-key products; computed in the dtype given (pass float32 or wider).
        allowed: True where a query may see a key; None allows all.
        variant: which normalization.

    Returns:
        Probabilities. A row sums to 1 for `vanilla`, to less than 1 for the others (its attention mass).
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    row_max = scores.amax(dim=-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    if variant == "softmax1":
        shift = row_max.detach().clamp(min=0.0)
        sink = torch.exp(-shift)
    elif variant == "max_shift":
        shift = row_max
        sink = torch.ones_like(shift)
    else:
        shift = row_max.detach()
        # 1 only where nothing is allowed, so that 0 / 0 does not arise.
        sink = (scores == float("-inf")).all(dim=-1, keepdim=True).to(scores.dtype)
    exponentials = torch.exp(scores - shift)
    return exponentials / (sink + exponentials.sum(dim=-1, keepdim=True))
