"""Pictures of outliers: what one head does, and the norm of every token behind every layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.evaluation.observation import observe
from sparq.evaluation.seen_attention import SeenAttention
from sparq.models.families import decoder_blocks


@dataclass(frozen=True, kw_only=True)
class HeadMaps:
    """One head on one sequence, in float32 on the CPU.

    Attributes:
        probabilities: a row is a query. It sums to 1 for softmax, and to less for `softmax1` and `max_shift`.
        values: what the head reads from each key.
        output: what the head adds up for each query, gated if there are gates.
    """

    probabilities: Float[Tensor, "queries keys"]
    values: Float[Tensor, "keys head_dim"]
    output: Float[Tensor, "queries head_dim"]


def head_maps(model: PreTrainedModel, input_ids: Int[Tensor, " length"], layer: int, head: int) -> HeadMaps:
    """Return what one head does on one sequence: probability, value and output (figure 4 of SpARQ).

    Args:
        model: a causal LM of a supported family, converted or not.
        input_ids: one sequence without padding.
        layer: index of the decoder block, from 0.
        head: index of the query head, from 0.

    Raises:
        SparqError: there is no such layer or head, or the attention cannot be watched.
    """
    num_layers, num_heads = len(decoder_blocks(model)), model.config.num_attention_heads
    if not 0 <= layer < num_layers:
        raise SparqError(f"no layer {layer}: the model has layers 0 to {num_layers - 1}")
    if not 0 <= head < num_heads:
        raise SparqError(f"no head {head}: the model has heads 0 to {num_heads - 1}")
    found: list[HeadMaps] = []

    def on_attention(index: int, seen: SeenAttention) -> None:
        if index == layer:
            parts = (seen.probabilities[0, head], seen.values()[0, head], seen.output[0, :, head])
            probabilities, values, output = (part.float().cpu().clone() for part in parts)
            found.append(HeadMaps(probabilities=probabilities, values=values, output=output))

    _observe_one(model, input_ids, on_attention=on_attention)
    return found[0]


def token_norms(model: PreTrainedModel, input_ids: Int[Tensor, " length"]) -> Float[Tensor, "layers tokens"]:
    """Return max |x| over the hidden size, of every token behind every decoder block, in float32 on the CPU.

    Massive activations show as columns: a few tokens, most often the first, stay large through most layers.

    Args:
        model: a causal LM of a supported family, with any attention implementation.
        input_ids: one sequence without padding.
    """
    rows: list[Tensor] = []

    def on_hidden(_index: int, hidden: Float[Tensor, "batch length hidden"]) -> None:
        rows.append(hidden[0].abs().amax(dim=-1).float().cpu())

    _observe_one(model, input_ids, on_hidden=on_hidden)
    return torch.stack(rows)


def most_sinky_head(model: PreTrainedModel, input_ids: Int[Tensor, " length"]) -> tuple[int, int]:
    """Return the layer and the head that give the first token the largest mean probability.

    The mean is over the queries with more than one key. Of equal heads the first of the first layer is taken,
    so the choice is reproducible: choose on one model, then draw the same head of others.

    Args:
        model: a causal LM of a supported family, converted or not.
        input_ids: one sequence of two or more tokens, without padding.

    Raises:
        SparqError: the sequence is too short, or the attention cannot be watched.
    """
    if len(input_ids) < 2:
        raise SparqError(f"a sequence of {len(input_ids)} tokens has no choice of keys: give 2 or more")
    shares: list[Tensor] = []

    def on_attention(_index: int, seen: SeenAttention) -> None:
        shares.append(seen.probabilities[0, :, 1:, 0].mean(dim=-1, dtype=torch.float64).cpu())

    _observe_one(model, input_ids, on_attention=on_attention)
    table = torch.stack(shares)  # layers heads
    layer, head = divmod(int(table.argmax()), table.shape[1])
    return layer, head


def _observe_one(model: PreTrainedModel, input_ids: Int[Tensor, " length"], **callbacks: object) -> None:
    assert input_ids.ndim == 1, "one sequence of token ids"
    observe(model, input_ids[None], torch.ones_like(input_ids[None]), **callbacks)  # type: ignore[arg-type]
