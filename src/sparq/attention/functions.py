"""The attention as transformers calls it.

A function that is registered without a mask function of the same name receives no mask at all, and causality and
padding vanish silently; `register_attention` registers both.
"""

import functools
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparq.attention.fused_cuda import packed_kernel
from sparq.attention.module import CHILD, OutlierFreeAttention
from sparq.attention.packed import Documents, documents_of
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
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's attention; the signature is that of transformers' attention functions.

    Raises:
        SparqError: the layer was not converted, or packed documents are not one row without a cache.
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
    documents = documents_of(kwargs, query, key)
    if documents is not None:
        if not converted.shows:
            output = _packed(module, converted, query, key, value, documents, scaling=scaling, dropout=dropout)
            return converted.gated(output), None
        attention_mask = documents.mask()
    if converted.writes_out(query, key, dropout) or not converted.is_softmax:
        output, probabilities = converted(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
        return output, probabilities
    # The pretrained function is left to transformers, so that its results are the same to the last bit.
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    return converted.gated(output), None


def _packed(
    module: nn.Module, converted: OutlierFreeAttention, query: Tensor, key: Tensor, value: Tensor,
    documents: Documents, *, scaling: float, dropout: float,
) -> Tensor:  # fmt: skip
    kernel = packed_kernel(query, documents)
    if kernel is not None and dropout == 0 and converted.has_sink_kernel:
        return converted.attend_packed(query, key, value, kernel, scaling=scaling)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if converted.writes_out(query, key, dropout) or not converted.is_softmax:
            return converted.attend(query, key, value, mask, scaling=scaling, dropout=dropout)[0]
        output: Tensor
        output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
        return output

    attend_short = None
    if query.device.type == "cpu" and dropout == 0 and (converted.has_sink_kernel or converted.has_maximum):
        attend_short = functools.partial(converted.attend_short, scaling=scaling)
    return documents.attend_each(attend, attend_short, query, key, value)


def register_attention() -> None:
    """Make the attention known to transformers, with its masks; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
