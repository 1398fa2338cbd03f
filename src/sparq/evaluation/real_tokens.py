"""Which tokens of a batch are no padding."""

from collections.abc import Mapping

from jaxtyping import Bool, Shaped
from torch import Tensor

from sparq.errors import SparqError


def real_tokens(batch: Mapping[str, Shaped[Tensor, "..."]]) -> Bool[Tensor, "batch length"]:
    """Return the mask of a batch of `input_ids` and `attention_mask` as booleans.

    Raises:
        SparqError: one of the two is missing, they differ in shape, or a sequence has no token.
    """
    if missing := {"input_ids", "attention_mask"} - set(batch):
        raise SparqError(f"a batch needs input_ids and attention_mask, and has no {' and no '.join(sorted(missing))}")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.shape != mask.shape or ids.ndim != 2:
        raise SparqError(
            f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must both be [batch, length]"
        )
    keep = mask.ne(0)
    if not keep.any(dim=1).all():
        raise SparqError(f"sequence {int(keep.any(dim=1).int().argmin())} of a batch has no tokens, only padding")
    return keep
