"""What each variant would take away from a pretrained model's attention, before anyone trains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparq.attention import AttentionSpec, attention_probabilities
from sparq.errors import SparqError
from sparq.evaluation.observation import observe
from sparq.evaluation.seen_attention import SeenAttention
from sparq.models import converted_layers


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

    def on_attention(index: int, seen: SeenAttention) -> None:
        scores, allowed = seen.scores(), seen.allowed()
        for number, spec in enumerate(specs):
            sink = scores.new_zeros(1, 1) if spec.normalization == "learned_sink" else None
            kept = attention_probabilities(scores, allowed, spec.normalization, sink=sink, clip=spec.clip)
            # [batch heads queries]
            lost = (1 - kept.sum(dim=-1)) * counted[:, None]
            total[number, index] += lost.sum(dim=(0, 2), dtype=torch.float64).cpu()

    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        mask = batch.get("attention_mask")
        counted = torch.ones_like(ids) if mask is None else mask.to(model.device).ne(0)
        num_tokens += int(counted.sum())
        observe(model, ids, counted, on_attention=on_attention)
    if num_tokens == 0:
        raise SparqError("there is nothing to measure on: give at least one batch")
    return RemovedMass(variants=tuple(variants), mass=(total / num_tokens).float(), num_tokens=num_tokens)
