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
        added = truncated_svd(weight - rounded, rank)
    assert added is not None, "at least one round"
    return LoftQ(removed=removed, added=added)


def truncated_svd(matrix: Float[Tensor, "outputs inputs"], rank: int) -> LowRank:
    """Return the best approximation of a rank, U S V^T, as U sqrt(S) and sqrt(S) V^T.

    The eigenvectors of the smaller Gram matrix are one side, and what they leave of the matrix is the other: a small
    part of the time of a whole SVD, and as good an approximation up to the rounding of float32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = truncated_svd(matrix.T, rank)
        return LowRank(a=turned.b.T.contiguous(), b=turned.a.T.contiguous())
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]  # [outputs, rank]
    right = left.T @ matrix  # S V^T
    root = right.norm(dim=1).sqrt()
    # A matrix of lower rank has nothing there: 0 / 1.
    return LowRank(a=right / torch.where(root == 0, 1, root).unsqueeze(1), b=left * root)


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
