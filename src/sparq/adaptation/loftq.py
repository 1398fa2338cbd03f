"""LoftQ: a quantized base and adapters that make up for its error (Li et al. 2023, arXiv 2310.08659, algorithm 1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.adaptation.quantized_base import LowRank, frozen
from sparq.adaptation.settings import Base
from sparq.models.families import named_linears
from sparq.progress import progress


class LoftQ(NamedTuple):
    """One layer's start: the base is Q(W - removed), and `added` is what the adapters amount to at first."""

    removed: LowRank | None
    added: LowRank


@torch.no_grad()
def loftq(weight: Float[Tensor, "outputs inputs"], *, rank: int, base: Base, iterations: int) -> LoftQ:
    """Alternate between rounding and the best approximation of what rounding left.

        W_t = D(Q(W - R_(t-1))),    R_t = the `rank` largest singular parts of W - W_t,    R_0 = 0

    so that W_T + R_T is near W. After one round the base is Q(W), as in QLoRA, and only the adapters differ.

    Args:
        weight: W.
        rank: r.
        base: what Q rounds to.
        iterations: T, at least 1.
    """
    weight = weight.float()
    removed, added = None, None
    for _ in range(iterations):
        removed = added
        rounded = frozen(weight if removed is None else weight - removed.product, base).dequantized()
        left, singular, right = torch.linalg.svd(weight - rounded, full_matrices=False)
        root = singular[:rank].sqrt()
        added = LowRank(a=root.unsqueeze(1) * right[:rank], b=left[:, :rank] * root)
    assert added is not None, "at least one round"
    return LoftQ(removed=removed, added=added)


def loftq_layers(
    model: PreTrainedModel, targets: tuple[str, ...], *, rank: int, base: Base, iterations: int
) -> dict[str, LoftQ]:
    """Return LoftQ's start of every target layer, by name."""
    chosen = [(name, layer) for name, layer in named_linears(model) if name.rpartition(".")[2] in targets]
    starts = {}
    with progress(f"LoftQ for {base}", total=len(chosen), unit="layer") as bar:
        for name, layer in chosen:
            assert isinstance(layer, nn.Linear)
            starts[name] = loftq(layer.weight.detach(), rank=rank, base=base, iterations=iterations)
            bar.update()
    return starts
