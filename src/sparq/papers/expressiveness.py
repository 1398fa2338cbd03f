"""SpARQ theorem C.1 by construction: low-rank adapters that make one transformer compute what another does.

The theorem says that a frozen transformer of definition C.2 can be adapted to any other of its shape by adapters of
rank R >= max over layers of ceil(G / 2), where G is the rank of the difference of the products that a layer computes
with. The construction is that of its proof, which follows Zeng and Lee 2023 (arXiv 2310.17513, lemma 7).

Assumption C.1 as printed is not quite what the proof needs: its second and fourth lines end with the inverse of the
target's W_2, where the proof has the target's W_2 times the inverse of the frozen one's. What is checked here is the
proof's.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sparq.errors import SparqError
from sparq.papers.softmax1_transformer import Heads, Matrix, TheoremBlock, TheoremTransformer

_SINGULAR = 1e-12
"""A matrix whose smallest singular value is below so much of its largest counts as singular."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A frozen model with its adapters.

    Attributes:
        model: the adapted model: frozen weights plus adapters, new biases.
        adapters: the adapters by name, of every head where they are heads'; what is not named is not adapted.
        errors: for each product, the largest singular value of what is left of the difference; 0 from the theorem's
            rank on, and sigma_(2R + 1) of the difference below it (lemma C.1 with two factors).
    """

    model: TheoremTransformer
    adapters: dict[str, Float[Tensor, "*heads width width"]]
    errors: dict[str, Float[Tensor, "*heads"]]


def truncated(matrix: Float[Tensor, "*heads width width"], rank: int) -> Float[Tensor, "*heads width width"]:
    """Return LRA_r of definition C.3: the sum of the `rank` largest singular parts."""
    left, values, right = torch.linalg.svd(matrix)
    kept = min(rank, values.shape[-1])
    nearest: Tensor = left[..., :kept] * values[..., None, :kept] @ right[..., :kept, :]
    return nearest


def adapt_product(
    first: Float[Tensor, "*heads width width"],
    second: Float[Tensor, "*heads width width"],
    target: Float[Tensor, "*heads width width"],
    rank: int,
) -> tuple[Float[Tensor, "*heads width width"], Float[Tensor, "*heads width width"]]:
    """Return changes of two matrices, each of at most `rank`, that bring their product nearest to `target` (lemma C.1).

    With E = target - first second, E_1 = LRA_R(E) and E_2 = LRA_2R(E) - E_1, the changes are

        d_second = first^-1 E_1,    d_first = E_2 (second + d_second)^-1,

    so that (first + d_first)(second + d_second) = first second + LRA_2R(E). No two changes of rank R come nearer,
    because they change the product by a matrix of rank 2R at most (Eckart and Young 1936).

    Raises:
        SparqError: `first`, or `second` with its change, cannot be inverted.
    """
    error = target - first @ second
    near = truncated(error, rank)
    second_change = torch.linalg.solve(_regular(first), near)
    rest = truncated(error, 2 * rank) - near
    first_change = torch.linalg.solve(_regular(second + second_change), rest, left=False)
    return first_change, second_change


def functionality_gaps(frozen: TheoremTransformer, target: TheoremTransformer) -> list[int]:
    """Return G_1 to G_(L + 1) of theorem C.1, those of the blocks and of the output layer."""
    gaps = []
    for index, blocks in enumerate(zip(frozen.blocks, target.blocks, strict=True)):
        before = [model.blocks[index - 1].second if index else None for model in (frozen, target)]
        ours, theirs = (_products(block, second) for block, second in zip(blocks, before, strict=True))
        gaps.append(max(int(torch.linalg.matrix_rank(b - a).max()) for a, b in zip(ours, theirs, strict=True)))
    products = [model.head @ model.blocks[-1].second for model in (frozen, target)]
    return [*gaps, int(torch.linalg.matrix_rank(products[1] - products[0]))]


def needed_rank(frozen: TheoremTransformer, target: TheoremTransformer) -> int:
    """Return the least rank of theorem C.1: the largest of ceil(G / 2)."""
    return max(-(-gap // 2) for gap in functionality_gaps(frozen, target))


def adapt(frozen: TheoremTransformer, target: TheoremTransformer, rank: int) -> Adapted:
    """Return the frozen model with the adapters of theorem C.1's proof, each of at most `rank`.

    From rank `needed_rank` on the adapted model computes what the target does. Below it each product comes as near as
    any adapters of this rank can bring it.

    Raises:
        SparqError: the models differ in shape, the rank is not positive, or a matrix that the proof inverts is
            singular.
    """
    if rank < 1:
        raise SparqError(f"rank is {rank}: expected at least 1")
    if len(frozen.blocks) != len(target.blocks) or frozen.normalization != target.normalization:
        raise SparqError("the models differ: expected the same number of blocks and the same normalization")
    adapters: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}

    def fit(names: tuple[str, str], first: Tensor, second: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        changes = adapt_product(first, second, product, rank)
        adapters.update(zip(names, changes, strict=True))
        changed = first + changes[0], second + changes[1]
        errors[" ".join(names)] = torch.linalg.matrix_norm(product - changed[0] @ changed[1], ord=2)
        return changed

    blocks: list[TheoremBlock] = []
    carried: Matrix | None = None  # W_2 of the target times the inverse of the frozen one's: Z_target = carried Z
    for index, (own, other) in enumerate(zip(frozen.blocks, target.blocks, strict=True)):
        scores, values = _products(other, carried)
        key, query = fit((f"{index}.key", f"{index}.query"), own.key.mT, own.query, scores)
        wanted = torch.linalg.solve(_regular(own.first), values)
        output, value = fit((f"{index}.output", f"{index}.value"), own.output, own.value, wanted)
        adapters[f"{index}.key"] = adapters[f"{index}.key"].mT
        carried = torch.linalg.solve(_regular(own.second), other.second, left=False)
        bias = torch.linalg.solve(_regular(carried), other.second_bias)
        block = replace(own, query=query, key=key.mT, value=value, output=output)
        blocks.append(replace(block, first_bias=other.first_bias, second_bias=bias))
    last, wanted = target.blocks[-1], target.head @ target.blocks[-1].second
    head, second = fit(("head", "second"), frozen.head, frozen.blocks[-1].second, wanted)
    bias = torch.linalg.solve(_regular(head), target.head @ last.second_bias)
    blocks[-1] = replace(blocks[-1], second=second, second_bias=bias)
    return Adapted(model=replace(frozen, blocks=tuple(blocks), head=head), adapters=adapters, errors=errors)


def _products(block: TheoremBlock, before: Matrix | None) -> tuple[Heads, Heads]:
    """Return W_K^T W_Q and W_1 W_O W_V of each head, as functions of what `before` is multiplied with."""
    scores, values = block.key.mT @ block.query, block.first @ block.output @ block.value
    return (scores, values) if before is None else (before.T @ scores @ before, values @ before)


def _regular(matrix: Float[Tensor, "*heads width width"]) -> Float[Tensor, "*heads width width"]:
    values = torch.linalg.svdvals(matrix)
    if bool((values[..., -1] <= _SINGULAR * values[..., 0]).any()):
        raise SparqError("a matrix that theorem C.1 inverts is singular: assumption C.1 does not hold for these models")
    return matrix
