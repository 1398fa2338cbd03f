"""What tests of adaptation share: data, models, and every combination that goes a separate way."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_families import tiny_model
from sparq.adaptation.settings import Base
from sparq.data import IGNORE, Batch
from sparq.models.conversion import convert

BASES: tuple[Base, ...] = ("int8", "nf4", "nf4-double")
CASES = [
    ("opt_350m", {}), ("opt_350m", {"initialization": "pissa", "dora": True}), ("opt_350m", {"initialization": "eva"}),
    ("opt_350m", {"base": "int8"}), ("opt_350m", {"base": "nf4", "initialization": "loftq"}),
    ("llama", {"dora": True}), ("llama", {"rslora": True, "initialization": "pissa"}),
    ("llama", {"initialization": "olora"}), ("llama", {"base": "int8", "dora": True}),
    ("llama", {"base": "int8", "initialization": "loftq", "dora": True}),
    ("llama", {"base": "nf4", "initialization": "eva"}), ("llama", {"base": "nf4-double", "dora": True}),
    ("llama", {"base": "nf4-double", "initialization": "loftq", "rslora": True}),
]  # fmt: skip
"""Every base, start and variant, and the combinations that go separate ways."""


def data(num: int = 3) -> list[Batch]:
    """Batches whose first tokens are prompts."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(num):
        ids = torch.randint(5, 50, (8, 20), generator=generator)
        labels = ids.clone()
        labels[:, :4] = IGNORE
        batches.append(Batch(input_ids=ids, labels=labels, num_targets=8 * 16, lengths=(ids.shape[1],) * len(ids)))
    return batches


def outlier_free(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    convert(model, "softmax1")
    return model


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())
