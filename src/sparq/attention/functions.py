"""The attention as transformers calls it.

A function that is registered without a mask function of the same name receives no mask at all, and causality and
padding vanish silently; `register_attention` registers both.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparq.attention.module import CHILD, OutlierFreeAttention
from sparq.errors import SparqError

IMPLEMENTATION = "sparq"
"""The name under which transformers knows the attention; which variant it is, each layer's module says."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's attention; the signature is that of transformers' attention functions.

    Raises:
        SparqError: the layer was not converted.
    """
    converted = getattr(module, CHILD, None)
    if not isinstance(converted, OutlierFreeAttention):
        raise SparqError(
            f"a layer of attention implementation {IMPLEMENTATION!r} was not converted: load the model with"
            " sparq.load_model, or call sparq.convert on it"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if converted.quantizer is not None:
        query, key, value = converted.quantizer.inputs(query, key, value)
    if converted.writes_out(query, key, dropout) or not converted.is_softmax:
        output, probabilities = converted(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
        return output, probabilities
    # The pretrained function is left to transformers, so that its results are the same to the last bit.
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    return converted.gated(output), None


def register_attention() -> None:
    """Make the attention known to transformers, with its masks; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
