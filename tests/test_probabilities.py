"""The normalizations against closed forms, a slow reference, and their gradients."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparq.attention import NORMALIZATIONS, Clip, attention_probabilities

SAFE = [name for name in NORMALIZATIONS if name != "none"]


def slow_row(scores: list[float], normalization: str, sink: float = 0.0) -> list[float]:
    """One row with Python floats, straight from the formulas."""
    m = max(scores)
    if normalization in ("vanilla", "vanilla_max_shift"):
        total = sum(math.exp(s - m) for s in scores)
        return [math.exp(s - m) / total for s in scores]
    if normalization == "max_shift":
        scores = [s - m for s in scores]
    if normalization == "mean":
        scores = [s - sum(scores) / len(scores) for s in scores]
    if normalization == "l1":
        norm = sum(abs(s) for s in scores)
        scores = [s / norm if norm else 0.0 for s in scores]
    return [math.exp(s) / (math.exp(sink) + sum(math.exp(t) for t in scores)) for s in scores]


@given(
    row=st.lists(st.floats(-30, 30).map(lambda x: round(x, 6)), min_size=1, max_size=9),
    normalization=st.sampled_from(NORMALIZATIONS),
    sink=st.floats(-20, 20),
)
def test_equals_the_formula(row: list[float], normalization: str, sink: float) -> None:
    b = sink if normalization == "learned_sink" else 0.0
    logit = torch.full((1, 1), b, dtype=torch.float64) if normalization == "learned_sink" else None
    ours = attention_probabilities(torch.tensor([row], dtype=torch.float64), None, normalization, sink=logit)
    torch.testing.assert_close(ours[0], torch.tensor(slow_row(row, normalization, b), dtype=torch.float64))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_masked_key_is_no_key(normalization: str) -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64)
    allowed = torch.tensor([True, False, True, True, False]).expand(2, 3, 5)
    sink = torch.tensor([[[0.3]]], dtype=torch.float64)
    ours = attention_probabilities(scores, allowed, normalization, sink=sink)
    assert (ours[~allowed] == 0).all()
    alone = attention_probabilities(scores[allowed].view(2, 3, 3), None, normalization, sink=sink)
    torch.testing.assert_close(ours[allowed].view(2, 3, 3), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [-1e4, -95.0, 0.0, 95.0, 1e4])
@pytest.mark.parametrize("normalization", SAFE)
def test_extreme_logits_and_empty_rows_stay_finite(normalization: str, level: float, dtype: torch.dtype) -> None:
    scores = (torch.randn(4, 6) + level).to(dtype).requires_grad_()
    sink = torch.full((1, 1), 2.0, dtype=dtype, requires_grad=True)
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[2] = False
    probabilities = attention_probabilities(scores, allowed, normalization, sink=sink)
    probabilities.float().square().sum().backward()
    assert probabilities.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert sink.grad is None or sink.grad.isfinite().all()
    assert (probabilities[2] == 0).all()
    assert (scores.grad[2] == 0).all()


def test_the_unshifted_form_overflows_where_the_formula_does() -> None:
    """The N/A of SpARQ table 4: it is the computation, not the function, that has no value."""
    scores = torch.tensor([[1.0, 89.0]])
    assert attention_probabilities(scores, None, "none").isnan().any()
    torch.testing.assert_close(attention_probabilities(scores, None, "softmax1"), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(
        attention_probabilities(scores / 2, None, "none"), attention_probabilities(scores / 2, None, "softmax1")
    )


@pytest.mark.parametrize("clip", [None, Clip(alpha=0.9, eta=1.1, length=4)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient(normalization: str, clip: Clip | None) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(1, 1, dtype=torch.float64, requires_grad=True)
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(1)
    assert torch.autograd.gradcheck(
        lambda s, b: attention_probabilities(s, allowed, normalization, sink=b, clip=clip), (scores, sink)
    )


@settings(max_examples=50)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12))
def test_attention_mass(row: list[float]) -> None:
    scores = torch.tensor([row], dtype=torch.float64)
    mass = {n: float(attention_probabilities(scores, None, n).sum()) for n in ("vanilla", "softmax1", "max_shift")}
    assert mass["vanilla"] == pytest.approx(1)
    assert mass["softmax1"] == pytest.approx(float(torch.sigmoid(torch.logsumexp(scores[0], 0))))
    # The papers' equation 3.2 can never give a row less than half, nor more than L / (L + 1).
    assert 0.5 - 1e-12 <= mass["max_shift"] <= len(row) / (len(row) + 1) + 1e-12


def test_a_sink_joins_softmax_and_softmax1() -> None:
    scores = torch.randn(4, 7, dtype=torch.float64)

    def with_sink(logit: float) -> torch.Tensor:
        return attention_probabilities(scores, None, "learned_sink", sink=torch.full((1, 1), logit).double())

    assert torch.equal(with_sink(-math.inf), attention_probabilities(scores, None, "vanilla"))
    assert torch.equal(with_sink(0.0), attention_probabilities(scores, None, "softmax1"))


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), st.sampled_from(["vanilla", "softmax1"]))
def test_clipping(row: list[float], normalization: str) -> None:
    scores = torch.tensor([row], dtype=torch.float64)
    plain = attention_probabilities(scores, None, normalization)
    clip = Clip(alpha=12.0, eta=1.03, length=100)
    clipped = attention_probabilities(scores, None, normalization, clip=clip)
    expected = [min(max((1.03 + 0.12) * float(p) - 0.12, 0.0), 1.0) for p in plain[0]]
    torch.testing.assert_close(clipped[0], torch.tensor(expected, dtype=torch.float64))
