"""One query over cached keys against the written-out attention: every variant, masks, groups, types, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparq.attention import NORMALIZATIONS, AttentionSpec, OutlierFreeAttention, reference_attention
from sparq.attention.decode import decode_attention

VARIANTS = [*NORMALIZATIONS, "clipped", "softmax1+clipped", "max_shift+clipped"]


def inputs(batch: int, kv: int, groups: int, keys: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    query = scale * torch.randn(batch, 1, kv * groups, 8, dtype=torch.float64).transpose(1, 2)
    key, value = (torch.randn(batch, kv, keys, 8, dtype=torch.float64) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=40)
@given(
    batch=st.integers(1, 3), kv=st.integers(1, 3), groups=st.integers(1, 3), keys=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 8.0]), mask=st.sampled_from(["none", "shared", "per_head"]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_the_reference(
    name: str, batch: int, kv: int, groups: int, keys: int, scale: float, mask: str, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = inputs(batch, kv, groups, keys, scale=scale)
    spec = AttentionSpec.parse(name)
    sink = torch.randn(kv * groups, dtype=torch.float64) if name == "learned_sink" else None
    allowed, bias = None, None
    if mask != "none":
        allowed = torch.rand(batch, 1 if mask == "shared" else kv * groups, 1, keys) < 0.5  # some see no key at all
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    ours = decode_attention(query, key, value, bias, sink, spec=spec, scaling=0.35)
    expected, _ = reference_attention(query, key, value, allowed, spec=spec, scaling=0.35, sink=sink)
    torch.testing.assert_close(ours.transpose(1, 2), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_16_bit_and_float32_stay_near_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    low = [x.to(dtype) for x in inputs(2, 3, 3, 300)]
    spec = AttentionSpec.parse(name)
    sink = torch.randn(9) if name == "learned_sink" else None
    ours = decode_attention(*low, None, sink, spec=spec, scaling=0.35)
    exact, _ = reference_attention(*(x.double() for x in low), None, spec=spec, scaling=0.35, sink=sink)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.transpose(1, 2).double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "none"])
def test_extreme_logits_stay_finite(name: str, level: float, dtype: torch.dtype) -> None:
    query = torch.full((1, 4, 1, 8), level / 0.35 / 8).to(dtype)
    key = (1 + 0.01 * torch.randn(1, 2, 6, 8)).to(dtype)
    value = torch.randn(1, 2, 6, 8).to(dtype)
    sink = torch.ones(4) if name == "learned_sink" else None
    spec = AttentionSpec.parse(name)
    ours = decode_attention(query, key, value, None, sink, spec=spec, scaling=0.35)
    exact, _ = reference_attention(*(x.double() for x in (query, key, value)), None, spec=spec, scaling=0.35, sink=sink)
    assert ours.isfinite().all()
    if abs(level) == 100:  # at 1e4 a rounded score picks another key
        torch.testing.assert_close(ours.transpose(1, 2).double(), exact, atol=0.5 * float(value.abs().max()), rtol=0)


def test_the_layer_decodes_without_a_gradient_and_writes_out_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = OutlierFreeAttention(AttentionSpec.parse("mean"), hidden=32, heads=4, head_dim=8, like=torch.zeros(1))
    query, key, value = (x.float() for x in inputs(1, 2, 2, 5))
    calls: list[int] = []
    monkeypatch.setattr(
        "sparq.attention.module.decode_attention", lambda *a, **k: calls.append(1) or decode_attention(*a, **k)
    )
    with torch.no_grad():
        fast, _ = layer(query, key, value, None, scaling=0.35)
    slow, probabilities = layer(query, key, value, None, scaling=0.35)
    assert calls == [1]
    assert probabilities is not None
    torch.testing.assert_close(fast, slow)
