"""Sequences as tensors: padded rows, or documents packed into one row."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparq.tokens import Example

IGNORE = -100
"""The label of a position without loss."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences and what the loss counts on.

    Attributes:
        input_ids: padded rows, with padding on the right, where a causal model needs no mask for it; or one packed row.
        labels: the input ids where the loss counts, else `IGNORE`.
        num_targets: labels that count.
        lengths: tokens of each sequence.
        packed: whether the sequences lie one after another in one row.
        seconds: how long the speech in it lasts.
        epochs: how many epochs a training has seen with it, in parts of one; None outside of a training's stream.
    """

    input_ids: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    num_targets: int
    lengths: tuple[int, ...]
    packed: bool = False
    seconds: float = 0.0
    epochs: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences, padding left out."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device."""
        return dataclasses.replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))

    def model_inputs(self) -> dict[str, Any]:
        """Return what a decoder is called with; of a packed row it is told where sequences begin."""
        if not self.packed:
            return {"input_ids": self.input_ids}
        starts = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(length) for length in self.lengths])[None]
        device = self.input_ids.device
        return {
            "input_ids": self.input_ids,
            "position_ids": positions.to(device),
            "cu_seq_lens_q": starts.to(device),
            "max_length_q": max(self.lengths),
        }


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad examples on the right."""
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORE)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        input_ids[row, :end] = torch.tensor((*example.prompt, *example.target))
        labels[row, start:end] = torch.tensor(example.target)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        num_targets=sum(len(e.target) for e in examples),
        lengths=tuple(len(e) for e in examples),
        seconds=sum((e.seconds for e in examples), 0.0),
    )


def pack(examples: Sequence[Example]) -> Batch:
    """Put examples one after another, shortest first: attention computes short neighbors together."""
    examples = sorted(examples, key=len)
    assert all(example.prompt for example in examples), "the first token of a sequence is nobody's target"
    ids = [token for example in examples for token in (*example.prompt, *example.target)]
    labels = [label for example in examples for label in (*[IGNORE] * len(example.prompt), *example.target)]
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        num_targets=sum(len(e.target) for e in examples),
        lengths=tuple(len(e) for e in examples),
        packed=True,
        seconds=sum((e.seconds for e in examples), 0.0),
    )
