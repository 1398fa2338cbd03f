"""Theorem C.1 of SpARQ in numbers: built adapters, their ranks, and what is lost below the bound."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sparq.errors import SparqError
from sparq.papers.expressiveness import adapt, adapt_product, functionality_gaps, needed_rank
from sparq.papers.softmax1_transformer import TheoremBlock, TheoremTransformer

HEADS, WIDTH, BLOCKS, TOKENS = 2, 8, 3, 6


def random_model(seed: int, normalization: str = "softmax1", blocks: int = BLOCKS) -> TheoremTransformer:
    """Matrices with singular values from about 0.5 to 1.5, so that nothing is nearly singular."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def matrix(*heads: int) -> Tensor:
        left, _, right = torch.linalg.svd(normal(*heads, WIDTH, WIDTH))
        return left * (0.5 + torch.rand((*heads, 1, WIDTH), generator=generator, dtype=torch.float64)) @ right

    def block() -> TheoremBlock:
        return TheoremBlock(
            query=matrix(HEADS), key=matrix(HEADS), value=matrix(HEADS), output=matrix(HEADS),
            first=matrix(), first_bias=normal(WIDTH), second=matrix(), second_bias=normal(WIDTH),
        )  # fmt: skip

    return TheoremTransformer(
        blocks=tuple(block() for _ in range(blocks)),
        head=matrix(),
        normalization=normalization,  # type: ignore[arg-type]
    )


def inputs(seed: int = 99) -> Tensor:
    return torch.randn(WIDTH, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearby(frozen: TheoremTransformer, rank: int) -> TheoremTransformer:
    """The frozen model with changes of this rank in queries, values and head, and other biases."""
    generator = torch.Generator().manual_seed(5)

    def change(weight: Tensor) -> Tensor:
        left, right = (
            torch.randn((*weight.shape[:-2], *shape), generator=generator, dtype=torch.float64)
            for shape in ((WIDTH, rank), (rank, WIDTH))
        )
        return weight + 0.3 * left @ right

    blocks = tuple(
        dataclasses.replace(b, query=change(b.query), value=change(b.value), first_bias=-b.first_bias,
                            second_bias=2 * b.second_bias)
        for b in frozen.blocks
    )  # fmt: skip
    return dataclasses.replace(frozen, blocks=blocks, head=change(frozen.head))


def slow_forward(model: TheoremTransformer, x: Tensor) -> Tensor:
    """Definition C.2 element by element."""

    def softmax1(column: Tensor) -> Tensor:
        shift = column.max() if model.normalization == "max_shift" else 0.0
        exponentials = torch.exp(column - shift)
        return exponentials / (1 + exponentials.sum())

    z = x
    for b in model.blocks:
        attention = torch.zeros_like(z)
        for h in range(HEADS):
            for j in range(TOKENS):
                scores = torch.stack([(b.key[h] @ z[:, i]) @ (b.query[h] @ z[:, j]) for i in range(TOKENS)])
                p = softmax1(scores)
                attention[:, j] += sum(p[i] * (b.output[h] @ (b.value[h] @ z[:, i])) for i in range(TOKENS))
        z = torch.stack([b.second @ torch.relu(b.first @ a + b.first_bias) + b.second_bias for a in attention.T], dim=1)
    return torch.stack([softmax1(model.head @ column) for column in z.T], dim=1)


@pytest.mark.parametrize("normalization", ["softmax1", "max_shift"])
def test_the_transformer_is_that_of_the_definition(normalization: str) -> None:
    model, x = random_model(0, normalization), inputs()
    torch.testing.assert_close(model(x), slow_forward(model, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalization", ["softmax1", "max_shift"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_at_the_bound_any_model_becomes_any_other(normalization: str, blocks: int) -> None:
    """Two random models differ by full rank, so the bound is half of the width: to 1e-8 in float64, as claimed."""
    frozen, target = random_model(1, normalization, blocks), random_model(2, normalization, blocks)
    assert functionality_gaps(frozen, target) == [WIDTH] * (blocks + 1)
    rank = needed_rank(frozen, target)
    assert rank == WIDTH // 2
    adapted = adapt(frozen, target, rank)
    for seed in range(5):
        x = inputs(seed)
        assert (frozen(x) - target(x)).abs().max() > 1e-2
        assert (adapted.model(x) - target(x)).abs().max() < 1e-8
    assert max(float(error.max()) for error in adapted.errors.values()) < 1e-8


def test_a_nearby_model_needs_a_small_rank() -> None:
    """Changes of rank 3 in one factor of each product need adapters of rank 2 on both."""
    frozen = random_model(3)
    target = nearby(frozen, 3)
    assert functionality_gaps(frozen, target) == [3] * (BLOCKS + 1)
    rank = needed_rank(frozen, target)
    assert rank == 2
    adapted = adapt(frozen, target, rank)
    assert (adapted.model(inputs()) - target(inputs())).abs().max() < 1e-8
    assert all(int(torch.linalg.matrix_rank(change, atol=1e-9, rtol=0.0).max()) <= rank
               for change in adapted.adapters.values())  # fmt: skip


def test_only_adapters_and_biases_differ_from_the_frozen_model() -> None:
    frozen, target = random_model(1), random_model(2)
    adapted = adapt(frozen, target, needed_rank(frozen, target))
    names = [f"{i}.{name}" for i in range(BLOCKS) for name in ("key", "query", "output", "value")]
    assert set(adapted.adapters) == {*names, "head", "second"}
    for index, (own, new) in enumerate(zip(frozen.blocks, adapted.model.blocks, strict=True)):
        for name in ("key", "query", "output", "value"):
            torch.testing.assert_close(getattr(own, name) + adapted.adapters[f"{index}.{name}"], getattr(new, name))
        assert torch.equal(own.first, new.first)
        if index < BLOCKS - 1:
            assert torch.equal(own.second, new.second)
    torch.testing.assert_close(frozen.blocks[-1].second + adapted.adapters["second"], adapted.model.blocks[-1].second)
    torch.testing.assert_close(frozen.head + adapted.adapters["head"], adapted.model.head)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_below_the_bound_the_error_is_eckart_youngs(rank: int) -> None:
    """What is left of each product is singular value 2R + 1 of the difference, and the models no longer agree."""
    frozen, target = random_model(1), random_model(2)
    adapted = adapt(frozen, target, rank)
    first = frozen.blocks[0], target.blocks[0]
    differences = {
        "0.key 0.query": first[1].key.mT @ first[1].query - first[0].key.mT @ first[0].query,
        "0.output 0.value": torch.linalg.inv(first[0].first) @ first[1].first @ first[1].output @ first[1].value
        - first[0].output @ first[0].value,
        "head second": target.head @ target.blocks[-1].second - frozen.head @ frozen.blocks[-1].second,
    }
    for name, difference in differences.items():
        expected = torch.linalg.svdvals(difference)[..., 2 * rank]
        torch.testing.assert_close(adapted.errors[name], expected, rtol=1e-9, atol=1e-12)
        assert (expected > 1e-2).all()
    assert (adapted.model(inputs()) - target(inputs())).abs().max() > 1e-6


def test_no_adapters_of_that_rank_do_better() -> None:
    """Gradient descent on the factors, from many places, never comes nearer than Eckart and Young allow."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    first, second, target = (torch.eye(5, dtype=torch.float64) + 0.3 * normal(5, 5) for _ in range(3))
    rank = 1
    values = torch.linalg.svdvals(target - first @ second)
    changes = adapt_product(first, second, target, rank)
    reached = torch.linalg.matrix_norm(target - (first + changes[0]) @ (second + changes[1]))
    bound = values[2 * rank :].square().sum().sqrt()
    assert float(reached) == pytest.approx(float(bound), rel=1e-9)
    for _ in range(4):
        factors = [normal(5, rank).mul(0.3).requires_grad_() for _ in range(4)]
        optimizer = torch.optim.Adam(factors, lr=2e-2)
        for _ in range(400):
            a, b, c, d = factors
            loss = torch.linalg.matrix_norm(target - (first + a @ b.T) @ (second + c @ d.T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() >= float(bound) * (1 - 1e-9)
        assert loss.item() < 1.5 * float(bound)  # it does look for the optimum


def test_what_the_theorem_excludes_is_refused() -> None:
    frozen, target = random_model(1), random_model(2)
    flat = dataclasses.replace(frozen.blocks[0], key=torch.zeros_like(frozen.blocks[0].key))
    with pytest.raises(SparqError, match="assumption C.1 does not hold"):
        adapt(dataclasses.replace(frozen, blocks=(flat, *frozen.blocks[1:])), target, 4)
    with pytest.raises(SparqError, match="rank is 0: expected at least 1"):
        adapt(frozen, target, 0)
    with pytest.raises(SparqError, match="same number of blocks"):
        adapt(frozen, random_model(2, blocks=2), 4)
