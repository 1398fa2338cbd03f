"""What each variant would take away from a pretrained model's attention, before anyone trains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.attention import AttentionSpec, OutlierFreeAttention, attention_probabilities
from sparq.errors import SparqError
from sparq.evaluation.observation import evaluating
from sparq.models import converted_layers, recording_attention


@dataclass(frozen=True, kw_only=True)
class RemovedMass:
    """Mean of 1 - sum(p) over the rows of real tokens.

    Attributes:
        variants: names of the variants.
        mass: what each takes away, of every head, when it sees the scores of the model as it is: a change in one layer
            would change the scores of the next, which is left out.
        num_tokens: how many rows were measured in each head.
    """

    variants: tuple[str, ...]
    mass: Float[Tensor, "variants layers heads"]
    num_tokens: int


@torch.no_grad()
def removed_mass(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], variants: Sequence[str]
) -> RemovedMass:
    """Measure how much attention each variant would take from each head of a model.

    Args:
        model: a converted causal LM, most often as `vanilla`.
        batches: model inputs, `input_ids` and perhaps `attention_mask`.
        variants: names, see `sparq.attention.spec`; those with weights of their own are taken at their start.

    Raises:
        SparqError: the model is not converted, or there are no batches.
    """
    layers = converted_layers(model)
    if not layers:
        raise SparqError("the model is not converted: call sparq.convert(model, 'vanilla') first")
    specs = [AttentionSpec.parse(name) for name in variants]
    total = torch.zeros(len(specs), len(layers), layers[0].heads, dtype=torch.float64)
    num_tokens = 0
    counted = torch.empty(0)

    def on_layer(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(layer, OutlierFreeAttention)
            query, key, _, mask = args
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = (query.float() @ keys.float().transpose(2, 3)) * kwargs["scaling"]
            allowed = torch.ones(scores.shape[2:], dtype=torch.bool).tril() if mask is None else mask
            for number, spec in enumerate(specs):
                sink = torch.zeros(1, 1) if spec.normalization == "learned_sink" else None
                kept = attention_probabilities(scores, allowed, spec.normalization, sink=sink, clip=spec.clip)
                # [batch heads queries]
                lost = (1 - kept.sum(dim=-1)) * counted[:, None]
                total[number, index] += lost.sum(dim=(0, 2), dtype=torch.float64).cpu()

        return hook

    handles = [layer.register_forward_pre_hook(on_layer(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        with evaluating(model), recording_attention(model):
            for batch in batches:
                ids = batch["input_ids"]
                mask = batch.get("attention_mask")
                counted = torch.ones_like(ids) if mask is None else mask.ne(0)
                num_tokens += int(counted.sum())
                model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if num_tokens == 0:
        raise SparqError("there is nothing to measure on: give at least one batch")
    return RemovedMass(variants=tuple(variants), mass=(total / num_tokens).float(), num_tokens=num_tokens)
