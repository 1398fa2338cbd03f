"""The three normalizations against closed forms, a slow reference, and their gradients."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparq.errors import SparqError
from sparq.models.softmax import ATTENTION_VARIANTS, attention_probabilities, check_variant


def slow_row(scores: list[float], variant: str) -> list[float]:
    """One row with Python floats, straight from the formulas."""
    m = max(scores)
    if variant == "vanilla":
        total = sum(math.exp(s - m) for s in scores)
        return [math.exp(s - m) / total for s in scores]
    if variant == "softmax1":
        return [math.exp(s) / (1 + sum(math.exp(t) for t in scores)) for s in scores]
    return [math.exp(s - m) / (1 + sum(math.exp(t - m) for t in scores)) for s in scores]


@given(
    rows=st.lists(st.floats(-30, 30, allow_nan=False), min_size=1, max_size=9),
    variant=st.sampled_from(ATTENTION_VARIANTS),
)
def test_equals_the_formula(rows: list[float], variant: str) -> None:
    ours = attention_probabilities(torch.tensor([rows], dtype=torch.float64), None, variant)
    torch.testing.assert_close(ours[0], torch.tensor(slow_row(rows, variant), dtype=torch.float64))


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_a_masked_key_is_no_key(variant: str) -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64)
    allowed = torch.tensor([True, False, True, True, False]).expand(2, 3, 5)
    ours = attention_probabilities(scores, allowed, variant)
    assert (ours[~allowed] == 0).all()
    torch.testing.assert_close(
        ours[allowed].view(2, 3, 3), attention_probabilities(scores[allowed].view(2, 3, 3), None, variant)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [-1e4, -95.0, 0.0, 95.0, 1e4])
@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_extreme_logits_and_empty_rows_stay_finite(variant: str, level: float, dtype: torch.dtype) -> None:
    scores = (torch.randn(4, 6) + level).to(dtype).requires_grad_()
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[2] = False
    probabilities = attention_probabilities(scores, allowed, variant)
    probabilities.float().square().sum().backward()
    assert probabilities.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (probabilities[2] == 0).all()
    assert (scores.grad[2] == 0).all()


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_gradient(variant: str) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(1)
    assert torch.autograd.gradcheck(lambda s: attention_probabilities(s, allowed, variant), scores)


@settings(max_examples=50)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12))
def test_attention_mass(rows: list[float]) -> None:
    scores = torch.tensor([rows], dtype=torch.float64)
    mass = {v: float(attention_probabilities(scores, None, v).sum()) for v in ATTENTION_VARIANTS}
    assert mass["vanilla"] == pytest.approx(1)
    assert mass["softmax1"] == pytest.approx(float(torch.sigmoid(torch.logsumexp(scores[0], 0))))
    # The papers' equation 3.2 can never give a row less than half, nor more than L / (L + 1).
    assert 0.5 - 1e-12 <= mass["max_shift"] <= len(rows) / (len(rows) + 1) + 1e-12


def test_unknown_name_is_answered_with_the_near_one() -> None:
    with pytest.raises(SparqError, match="unknown attention 'sofmax1': did you mean 'softmax1'"):
        check_variant("sofmax1")
