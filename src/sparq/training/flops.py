"""Floating point operations that a model's products need, and how many of them this machine does in a second."""

import time
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from sparq.bfloat16 import fast_products
from sparq.data import Batch
from sparq.devices import synchronize

_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """What forward and backward need, counted by products; what is computed twice counts once.

    A linear layer of n weights takes 2 n a token forward, 2 n for the gradient of its input and, if it is trained,
    2 n for that of its weights. Attention takes 12 head_dim for each head and pair of query and key that it sees:
    two products forward and four backward. The head counts at targets only.

    Attributes:
        per_token: of all linear layers but the head.
        per_target: of the head.
        per_pair: of attention.
    """

    per_token: int
    per_target: int
    per_pair: int

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "ModelFlops":
        """Count the layers of a model, with or without adapters."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        head = base.get_output_embeddings()
        layers = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
        config = base.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            per_token=sum(_linear(layer) for layer in layers),
            per_target=_linear(head),
            per_pair=12 * head_dim * heads * config.num_hidden_layers,
        )

    def of_batch(self, batch: Batch) -> int:
        """Return what a micro-batch needs, padding left out."""
        pairs = sum(length * (length + 1) // 2 for length in batch.lengths)
        return self.per_token * batch.num_tokens + self.per_target * batch.num_targets + self.per_pair * pairs


def _linear(layer: nn.Linear) -> int:
    return (6 if layer.weight.requires_grad else 4) * layer.in_features * layer.out_features


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of the fastest of a few products of square matrices, with the threads as they are.

    Matrices of 1024 rows on a CPU, of 8192 on a GPU; a tenth of a second.
    """
    size = _SIZE.get(device.type, 1024)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    fastest, spent = float("inf"), 0.0
    for number in range(100):
        start = time.perf_counter()
        with fast_products(device, dtype):
            torch.mm(a, b)
        synchronize(device)
        seconds = time.perf_counter() - start
        spent += seconds
        fastest = min(fastest, seconds)
        if number >= 3 and spent > 0.1:
            break
    return 2 * size**3 / fastest
