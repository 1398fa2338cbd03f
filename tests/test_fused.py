"""The fused ways against the written-out ones: outputs, gradients, masks, groups, types, extremes."""

import math

import pytest
import torch
from torch import Tensor

from sparq.attention import AttentionSpec, reference_attention
from sparq.attention.fused import flash_max_shift_attention, flash_sink_attention
from sparq.attention.row_max import row_max

FUSED = ["softmax1", "learned_sink", "max_shift"]


def inputs(
    queries: int, keys: int, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, heads: int = 4, kv: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    query = scale * torch.randn(2, queries, heads, 8, dtype=torch.float64).transpose(1, 2)
    key = torch.randn(2, kv, keys, 8, dtype=torch.float64)
    value = torch.randn(2, kv, keys, 8, dtype=torch.float64)
    return tuple(x.to(dtype).detach().requires_grad_() for x in (query, key, value))  # type: ignore[return-value]


def fused(name: str, qkv: tuple[Tensor, ...], sink: Tensor | None, bias: Tensor | None, causal: bool) -> Tensor:
    if name == "max_shift":
        return flash_max_shift_attention(*qkv, bias, is_causal=causal, scaling=0.35)
    return flash_sink_attention(*qkv, bias, sink, is_causal=causal, scaling=0.35)


def masks(kind: str, queries: int, keys: int) -> Tensor | None:
    if kind == "causal":
        return None
    allowed = torch.rand(2, 1, queries, keys) < 0.5
    allowed[0, 0, 1] = False
    return allowed.expand(2, 4, queries, keys) if kind == "per_head" else allowed


@pytest.mark.parametrize("kind", ["causal", "shared", "per_head"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (7, 7), (33, 33), (65, 130)])
@pytest.mark.parametrize("name", FUSED)
def test_outputs_and_gradients_equal_the_reference(name: str, queries: int, keys: int, kind: str) -> None:
    if kind == "causal":
        keys = queries
    qkv = inputs(queries, keys)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True) if name == "learned_sink" else None
    allowed = masks(kind, queries, keys)
    bias = None if allowed is None else torch.zeros(allowed.shape).double().masked_fill(~allowed, -math.inf)
    expected, _ = reference_attention(*qkv, allowed, spec=AttentionSpec.parse(name), scaling=0.35, sink=sink)
    ours = fused(name, qkv, sink, bias, allowed is None).transpose(1, 2)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(expected)
    wanted = [*qkv, *([] if sink is None else [sink])]
    for mine, theirs in zip(
        torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", FUSED)
def test_gradcheck(name: str) -> None:
    qkv = inputs(4, 4)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True) if name == "learned_sink" else None
    extra = () if sink is None else (sink,)
    assert torch.autograd.gradcheck(
        lambda q, k, v, *s: fused(name, (q, k, v), s[0] if s else None, None, True), (*qkv, *extra)
    )


# Largest of 60 draws: 3.7e-7, 5.0e-3 and 6.0e-4 for outputs, 4.0e-7, 4.6e-3 and 5.7e-4 for gradients. In 16 bit two
# keys may tie for the row's maximum within rounding, and the gradient of `max_shift` goes to one of them: there it was
# off by up to 0.07 of its norm.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", FUSED)
def test_16_bit_and_float32_stay_near_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    qkv = inputs(70, 70)
    low = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    sink = torch.randn(4) if name == "learned_sink" else None
    grad = torch.randn(2, 4, 70, 8).to(dtype)
    ours, theirs = fused(name, low, sink, None, True), fused(name, exact, sink, None, True)
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    mine = torch.autograd.grad(ours, low, grad)
    expected = torch.autograd.grad(theirs, exact, grad.double())
    for a, b in zip(mine, expected, strict=True):
        tied = name == "max_shift" and dtype != torch.float32
        assert (a.double() - b).norm() <= (0.1 if tied else tolerance) * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("name", FUSED)
def test_extreme_logits_stay_finite(name: str, level: float, dtype: torch.dtype) -> None:
    """Every score of a row is about `level`: keys are one direction, queries a multiple of it."""
    direction = torch.ones(8)
    query = (level / 0.35 / 8 * direction).expand(2, 4, 6, 8).to(dtype).clone().requires_grad_()
    key = (direction + 0.01 * torch.randn(2, 2, 6, 8)).to(dtype).requires_grad_()
    value = torch.randn(2, 2, 6, 8).to(dtype).requires_grad_()
    sink = torch.ones(4, requires_grad=True) if name == "learned_sink" else None
    bias = torch.zeros(2, 1, 6, 6, dtype=dtype).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    bias[0, 0, 3] = -math.inf
    out = fused(name, (query, key, value), sink, bias, False)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert (out[0, :, 3] == 0).all()
    for x in (query, key, value, sink):
        assert x is None or (x.grad is not None and x.grad.isfinite().all())
    assert query.grad is not None
    assert (query.grad[0, :, 3] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_row_max_in_blocks(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.attention.row_max._BLOCK_BYTES", 1)  # the smallest blocks
    query, key, _ = inputs(50, 50)
    logit, argmax = row_max(query, key, None, is_causal=causal, scaling=0.5)
    scores = 0.5 * query.detach() @ key.detach().repeat_interleave(2, dim=1).transpose(2, 3)
    if causal:
        scores = scores.masked_fill(torch.ones(50, 50, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(logit, scores.amax(dim=-1))
    assert torch.equal(argmax, scores.argmax(dim=-1))


def test_a_sink_at_minus_infinity_is_the_pretrained_attention() -> None:
    query, key, value = inputs(9, 9, dtype=torch.float32)
    sink = torch.full((4,), -math.inf)
    ours = flash_sink_attention(query, key, value, None, sink, is_causal=True, scaling=0.35)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.35, enable_gqa=True
    )
    assert torch.equal(ours, theirs)
