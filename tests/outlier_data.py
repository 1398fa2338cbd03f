"""Sequences, batches and models to measure outliers on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
MODELS = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """Large weights, so that attention is far from uniform."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 96, (length,), generator=generator) for length in lengths]


def padded(rows: Iterable[Tensor], side: str = "right", to: int = 0) -> Batch:
    rows = list(rows)
    length = max(to, *map(len, rows))
    ids, mask = (
        torch.ones(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(rows: Iterable[Tensor]) -> list[Batch]:
    return [padded([row]) for row in rows]
