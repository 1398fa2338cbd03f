"""Attention on CUDA: which kernel takes what, what the ops are called with, and, where there is a GPU, the numbers."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparq.attention import AttentionSpec, OutlierFreeAttention, reference_attention
from sparq.attention.fused import flash_max_shift_attention, flash_sink_attention, fused_kernel
from sparq.attention.fused_cpu import CPU
from sparq.attention.fused_cuda import (
    KERNELS,
    EfficientKernel,
    FlashKernel,
    align_bias,
    choose_backend,
    pad_lse,
    triton_fits,
)
from sparq.attention.fused_kernel import FusedKernel

A100, H100, T4, P100 = (8, 0), (9, 0), (7, 5), (6, 0)
NAMES = ["softmax1", "learned_sink", "max_shift"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "unmasked", "masked"),
    [
        (torch.bfloat16, 64, A100, "flash", "efficient"),
        (torch.float16, 128, H100, "flash", "efficient"),
        (torch.bfloat16, 192, A100, "flash", "efficient"),
        (torch.bfloat16, 256, A100, "efficient", "efficient"),
        (torch.float32, 64, H100, "efficient", "efficient"),
        (torch.float32, 4, A100, "efficient", "efficient"),
        (torch.float16, 64, T4, "efficient", "efficient"),
        (torch.bfloat16, 64, T4, None, None),
        (torch.float16, 64, P100, None, None),
        (torch.bfloat16, 4, A100, None, None),
        (torch.float64, 64, H100, None, None),
    ],
)
def test_the_choice_of_a_kernel(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], unmasked: str | None, masked: str | None
) -> None:
    assert choose_backend(dtype, head_dim, capability, masked=False) == unmasked
    assert choose_backend(dtype, head_dim, capability, masked=True) == masked


def test_a_mask_never_decides_whether_there_is_a_kernel() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for dtype, head_dim, capability in itertools.product(dtypes, range(1, 300), (P100, T4, A100, H100)):
        choices = [choose_backend(dtype, head_dim, capability, masked=masked) for masked in (True, False)]
        assert (choices[0] is None) == (choices[1] is None)
        # Whoever takes the Triton kernel for prompts has a kernel, so `writes_out` can ask one question.
        assert not triton_fits(dtype, head_dim, capability) or head_dim % 8 or choices[0] is not None


@pytest.mark.parametrize("keys", [1, 16, 30, 33])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 5), (1, 4, 5), (2, 4, 1)])
def test_an_aligned_bias_has_the_same_numbers(shape: tuple[int, ...], keys: int) -> None:
    bias = torch.randn(*shape, keys)
    aligned = align_bias(bias, (2, 4, 5))
    assert torch.equal(aligned, bias.expand(2, 4, 5, keys))
    assert aligned.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])


@pytest.mark.parametrize("queries", [1, 31, 32, 33])
def test_a_padded_lse_is_inf_at_the_end(queries: int) -> None:
    lse = torch.randn(2, 3, queries)
    padded = pad_lse(lse)
    assert padded.shape[-1] == math.ceil(queries / 32) * 32
    assert torch.equal(padded[..., :queries], lse)
    assert (padded[..., queries:] == math.inf).all()


def test_a_kernel_without_groups_gets_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys that were repeated are those of keys that the kernel shares."""
    query, key, value = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (6, 2, 2))
    grad = torch.randn(2, 6, 9, 8)
    found = []
    for has_groups in (True, False):
        monkeypatch.setattr("sparq.attention.fused.CPU", dataclasses.replace(CPU, has_groups=has_groups))
        for attend in (
            lambda *qkv: flash_sink_attention(*qkv, None, None, is_causal=True, scaling=0.35),
            lambda *qkv: flash_max_shift_attention(*qkv, None, is_causal=True, scaling=0.35),
        ):
            out = attend(query, key, value)
            found.append([out, *torch.autograd.grad(out, (query, key, value), grad)])
    for shared, repeated in zip(found[:2], found[2:], strict=True):
        for mine, theirs in zip(shared, repeated, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without numbers on an A100 that is not there: enough to ask who takes them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: A100)
    with FakeTensorMode():
        yield


@pytest.fixture
def kernels_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers on the device `meta` are as good as on an A100: the ops check what they are given."""

    def choose(query: Tensor, *, masked: bool) -> FusedKernel | None:
        backend = choose_backend(query.dtype, query.shape[-1], A100, masked=masked)
        return None if backend is None else KERNELS[backend]

    monkeypatch.setattr("sparq.attention.fused.fused_kernel", choose)
    monkeypatch.setattr("sparq.attention.module.fused_kernel", choose)


def layer(name: str, query: Tensor) -> OutlierFreeAttention:
    _, heads, _, head_dim = query.shape
    return OutlierFreeAttention(
        AttentionSpec.parse(name), hidden=heads * head_dim, heads=heads, head_dim=head_dim, like=query
    )


def inputs(queries: int, keys: int, dtype: torch.dtype, device: str, head_dim: int = 64) -> tuple[Tensor, ...]:
    query = torch.randn(2, queries, 4, head_dim, dtype=dtype, device=device).transpose(1, 2)
    key, value = (torch.randn(2, 2, keys, head_dim, dtype=dtype, device=device) for _ in range(2))
    return query, key, value


def some_mask(kind: str, queries: int, keys: int, dtype: torch.dtype, device: str) -> Tensor | None:
    if kind == "none":
        return None
    return torch.zeros(2, 1, queries, keys, dtype=torch.bool if kind == "boolean" else dtype, device=device)


def every_case(test: Callable[..., None]) -> Callable[..., None]:
    for names, values in (
        (("queries", "keys"), [(300, 300), (40, 300), (2, 300)]),
        ("kind", ["none", "boolean", "additive"]),
        ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
        ("name", NAMES),
    ):
        test = pytest.mark.parametrize(names, values)(test)
    return test


@pytest.mark.usefixtures("kernels_on_meta")
@every_case
def test_ops_are_called_rightly(name: str, dtype: torch.dtype, kind: str, queries: int, keys: int) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(queries, keys, dtype, "meta"))
    attention = layer(name, query)
    mask = some_mask(kind, queries, keys, dtype, "meta")
    out, _ = attention(query, key, value, mask, scaling=0.125)
    assert (out.shape, out.dtype) == ((2, queries, 4, 64), dtype)
    wanted = [query, key, value, *attention.parameters()]
    for x, grad in zip(wanted, torch.autograd.grad(out, wanted, torch.randn_like(out)), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    with torch.no_grad():
        assert attention(query, key, value, mask, scaling=0.125)[0].shape == out.shape


@pytest.mark.usefixtures("pretended_gpu")
def test_who_takes_queries_on_a_gpu() -> None:
    for dtype, head_dim, unmasked, masked in (
        (torch.bfloat16, 64, FlashKernel, EfficientKernel),
        (torch.float32, 64, EfficientKernel, EfficientKernel),
        (torch.float64, 64, type(None), type(None)),
        (torch.bfloat16, 12, type(None), type(None)),
    ):
        query, key, _ = inputs(200, 200, dtype, "cuda", head_dim)
        assert type(fused_kernel(query, masked=False)) is unmasked
        assert type(fused_kernel(query, masked=True)) is masked
        for name in NAMES:
            assert layer(name, query).writes_out(query, key, 0.0) == (masked is type(None))
            assert layer(name, query).writes_out(query, key, 0.1)
        assert layer("softmax1+clipped", query).writes_out(query, key, 0.0)


@needs_cuda
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (40, 333), (2, 300)])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", NAMES)
def test_cuda_equals_the_reference(
    name: str, dtype: torch.dtype, tolerance: float, kind: str, queries: int, keys: int
) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(queries, keys, dtype, "cuda"))
    mask = None
    if kind != "none":
        mask = torch.rand(2, 1, queries, keys, device="cuda") < 0.5
        mask[0, 0, 0] = False
    given = mask
    if mask is not None and kind == "additive":
        given = torch.zeros(mask.shape, dtype=dtype, device="cuda").masked_fill(~mask, torch.finfo(dtype).min)
    attention = layer(name, query)
    if name == "learned_sink":
        torch.nn.init.normal_(attention.sink)
    out, _ = attention(query, key, value, given, scaling=0.125)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    sink = None if attention.sink is None else attention.sink.detach().double().requires_grad_()
    expected, _ = reference_attention(*exact, mask, spec=AttentionSpec.parse(name), scaling=0.125, sink=sink)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, [query, key, value, *attention.parameters()], grad)
    theirs = torch.autograd.grad(expected, exact + ([] if sink is None else [sink]), grad.double())
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    for a, b in zip(mine, theirs, strict=True):
        # In 16 bit the row's maximum may be another key's within rounding.
        tied = name == "max_shift" and dtype != torch.float32
        assert (a.double() - b).norm() <= (0.1 if tied else tolerance) * b.norm()
