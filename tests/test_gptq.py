"""GPTQ against optimal brain surgery written out, its optimality, and whole models."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.quantization import QuantizationScheme, quantize
from sparq.quantization.gptq import gptq_round
from sparq.quantization.grid import Grid, weight_grid
from sparq.quantization.quantizer import dequantize, quantize_asymmetric, quantize_symmetric


def problem(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / tokens


def slow(weight: Tensor, hessian: Tensor, grid: Grid, damping: float, *, by_importance: bool) -> Tensor:
    """Optimal brain surgery (Hassibi and Stork 1993): after each column the exact update, from the inverse of what is
    left of the hessian."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    columns = weight.shape[1]
    left = list(range(columns))
    if by_importance:
        left.sort(key=lambda j: -float(hessian[j, j]))
    result = torch.zeros(weight.shape, dtype=torch.int8)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        j = left[0]
        one = grid.column(j, columns)
        result[:, j : j + 1] = one.round(weight[:, j : j + 1])
        error = weight[:, j] - one.value(result[:, j : j + 1]).double()[:, 0]
        weight[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return result


@settings(max_examples=30)
@given(
    outputs=st.integers(1, 6), groups=st.integers(1, 3), size=st.integers(2, 9), bits=st.integers(2, 8),
    symmetric=st.booleans(), by_importance=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_surgery_column_by_column(
    outputs: int, groups: int, size: int, bits: int, symmetric: bool, by_importance: bool, seed: int
) -> None:
    weight, hessian = problem(outputs, groups * size, 4 * groups * size, seed)
    grid = weight_grid(weight, bits, group_size=size, symmetric=symmetric)
    ours = gptq_round(weight, hessian, grid, damping=0.01, by_importance=by_importance)
    theirs = slow(weight, hessian, grid, 0.01, by_importance=by_importance)
    # A value within rounding of a tie may go either way, and everything after it then differs.
    assert (ours == theirs).float().mean() > 0.9
    value = [float(((grid.value(q) - weight) @ hessian @ (grid.value(q) - weight).T).trace()) for q in (ours, theirs)]
    assert value[0] <= 1.05 * value[1] + 1e-6


def test_more_columns_than_a_block_and_less_error_than_rounding() -> None:
    weight, hessian = problem(16, 300, 600)
    grid = weight_grid(weight, 3)
    rounded, compensated = (grid.value(q) - weight for q in (grid.round(weight), gptq_round(weight, hessian, grid)))
    errors = [float((e @ hessian * e).sum()) for e in (rounded, compensated)]
    assert errors[1] < 0.5 * errors[0]


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = problem(5, 40, 1)
    grid = weight_grid(weight, 4)
    assert torch.equal(gptq_round(weight, torch.eye(40), grid, by_importance=False), grid.round(weight))


def test_unused_inputs_get_zeros() -> None:
    weight, hessian = problem(4, 12, 50)
    hessian[3], hessian[:, 3] = 0, 0
    grid = weight_grid(weight, 4, symmetric=False)
    assert torch.all(grid.value(gptq_round(weight, hessian, grid))[:, 3] == 0)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_full_range_is_that_of_rounding_to_nearest(bits: int, group_size: int | None) -> None:
    weight, _ = problem(6, 24, 1)
    grid = weight_grid(weight, bits, group_size=group_size)
    integers, scale = quantize_symmetric(weight, bits, group_size)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.round(weight), integers)
    grid = weight_grid(weight, bits, group_size=group_size, symmetric=False)
    integers, scale, zero_point = quantize_asymmetric(weight, bits, group_size)
    assert torch.equal(grid.scale, scale)
    assert grid.zero_point is not None
    assert torch.equal(grid.zero_point, zero_point)
    assert torch.equal(grid.round(weight), integers)
    assert torch.equal(grid.value(integers), dequantize(integers, scale, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_range_has_the_least_error_and_the_percentile_reaches_to_it(symmetric: bool) -> None:
    weight = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 12.0

    def error(grid: Grid) -> Tensor:
        return (grid.value(grid.round(weight)) - weight).square().sum(1)

    full = weight_grid(weight, 4, symmetric=symmetric)
    searched = weight_grid(weight, 4, symmetric=symmetric, reach="mse")
    clipped = weight_grid(weight, 4, symmetric=symmetric, reach="percentile", tail=0.05)
    assert (error(searched) <= error(full)).all()
    assert error(searched).sum() < 0.9 * error(full).sum()
    low, high = np.quantile(weight.numpy(), [0.025, 0.975], axis=1)
    reach = 2 * np.maximum(-low, high) / 14 if symmetric else (high - low) / 15
    np.testing.assert_allclose(clipped.scale[:, 0].numpy(), reach, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_lose_less_than_by_rounding(family: str) -> None:
    model = convert(tiny_model(family), "softmax1")
    ids = torch.randint(3, 96, (16, 24), generator=torch.Generator().manual_seed(0))
    losses = {}
    with torch.no_grad():
        before = model(ids).logits
        for rounding in ("nearest", "gptq"):
            changed = quantize(model, [ids], method="gptq", rounding=rounding, weight_bits=3, activation_bits=16)
            losses[rounding] = float((changed(ids).logits - before).square().mean())
    assert losses["gptq"] < losses["nearest"]


def test_padding_is_left_out() -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    settings_ = {"method": "gptq", "weight_bits": 4, "activation_bits": 16}
    padded = quantize(model, [{"input_ids": ids, "attention_mask": mask}], **settings_)
    cut = quantize(model, [ids[:, :7]], **settings_)
    for (name, a), (_, b) in zip(padded.named_buffers(), cut.named_buffers(), strict=True):
        if name.endswith("proj.weight"):
            assert (a != b).float().mean() < 0.01, name


def test_mistakes_are_one_line() -> None:
    model = tiny_model("llama")
    with pytest.raises(SparqError, match="w4a4-gptq needs calibration data"):
        quantize(model, method="gptq", weight_bits=4, activation_bits=4)
    with pytest.raises(SparqError, match="calibration data has no tokens"):
        quantize(model, [], method="rotation", weight_bits=4, activation_bits=4)
    with pytest.raises(SparqError, match="token id 4000, but the model's vocabulary has 96"):
        quantize(model, [torch.full((1, 4), 4000)], method="gptq", weight_bits=4, activation_bits=4)
    for wrong, message in (
        ({"activation_clip": 0}, "activation_clip is 0; it must be a number more than 0 to 1"),
        ({"weight_range": "msr"}, "unknown weight range 'msr'.*mse"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(SparqError, match=message):
            QuantizationScheme.from_dict({"method": "rotation", "weight_bits": 4, "activation_bits": 4, **wrong})
