"""The Triton kernels of `max_shift`: on a GPU if there is one, else by Triton's interpreter; that they compile."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparq.attention import AttentionSpec, OutlierFreeAttention, reference_attention

pytest.importorskip("triton", reason="no Triton here: pip install sparq[triton]")

import triton.language as tl
from triton.runtime import interpreter

from sparq.attention import triton_max_shift
from sparq.attention.triton_max_shift import Blocks, triton_max_shift_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = AttentionSpec(normalization="max_shift")


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_products() -> Iterator[None]:
    """Multiply bfloat16 in the interpreter, which takes its bits for integers (Triton 3.7.1)."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.astype("int32")) << 16
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)

    def create_dot(builder: object, a: object, b: object, *rest: object) -> object:
        return original(builder, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and keys at small sizes, wider than high, higher than wide."""
    blocks = Blocks(rows=16, columns=32, warps=4)
    for name, value in (
        ("FORWARD", blocks), ("QUERY_GRADIENT", blocks), ("KEY_GRADIENT", Blocks(rows=32, columns=16, warps=4)),
    ):  # fmt: skip
        monkeypatch.setattr(triton_max_shift, name, dict.fromkeys((2, 4), value))


def draw(
    batch: int, kv: int, groups: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in the order in which models have them, keys and values in that of caches."""
    query = torch.randn(batch, queries, kv * groups, head_dim).transpose(1, 2)
    key, value = (torch.randn(batch, kv, keys, head_dim) for _ in range(2))
    return tuple(x.to(DEVICE, dtype).requires_grad_() for x in (query, key, value))  # type: ignore[return-value]


def compare(
    inputs: tuple[Tensor, ...], given: Tensor | None, mask: Tensor | None = None, *, scaling: float = 0.35,
    tolerance: float = 2e-6, tied: float | None = None,
) -> None:  # fmt: skip
    """Compare with the definition in float64, causal or with a mask.

    A gradient may be a small difference of large terms, so its error is measured by the sum of their absolute values.
    `tied` is the tolerance where the maximum of a row may be another key's within rounding.
    """
    ours = triton_max_shift_attention(*inputs, given, is_causal=mask is None, scaling=scaling)
    query, key, value = exact = [x.detach().double().requires_grad_() for x in inputs]
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE).tril()[None, None]
    expected, probabilities = reference_attention(*exact, mask, spec=SPEC, scaling=scaling)
    expected = expected.transpose(1, 2)
    assert (ours.shape, ours.dtype) == (expected.shape, inputs[0].dtype)
    assert (ours.double() - expected).norm() <= tolerance * expected.norm()
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, inputs, grad)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    groups = query.shape[1] // key.shape[1]
    with torch.no_grad():
        repeated = [x.abs().repeat_interleave(groups, dim=1) for x in (key, value)]
        products = grad.double().abs() @ repeated[1].transpose(2, 3)
        # P (dO v - delta), and delta again through the maximum, whose probability is that of the sink.
        scores = scaling * probabilities * (products + 2 * (probabilities * products).sum(dim=-1, keepdim=True))
        grad_key, grad_value = (
            (weights.transpose(2, 3) @ rows.abs()).unflatten(1, (-1, groups)).sum(dim=2)
            for weights, rows in ((scores, query), (probabilities, grad.double()))
        )
    for a, b, x, size in zip(mine, theirs, inputs, (scores @ repeated[0], grad_key, grad_value), strict=True):
        assert (a.shape, a.dtype) == (x.shape, x.dtype)
        assert (a.double() - b).norm() <= (tied or tolerance) * size.norm()


@pytest.mark.usefixtures("_small_blocks")
@settings(max_examples=10, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # too slow to shrink
@given(
    batch=st.integers(1, 2), kv=st.integers(1, 2), groups=st.integers(1, 3), queries=st.integers(1, 40),
    keys=st.integers(1, 40), head_dim=st.sampled_from([8, 20, 64]), seed=st.integers(0, 1000),
    kind=st.sampled_from(["causal", "all", "boolean", "additive"]), shared=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_any_shape_and_mask_equals_the_reference(
    batch: int, kv: int, groups: int, queries: int, keys: int, head_dim: int, seed: int, kind: str,
    shared: tuple[bool, bool],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    keys = queries if kind == "causal" else keys
    inputs = draw(batch, kv, groups, queries, keys, head_dim)
    shape = (1 if shared[0] else batch, 1 if shared[1] else kv * groups, queries, keys)
    allowed = torch.rand(shape, device=DEVICE) < (2.0 if kind == "all" else 0.4)
    bias = torch.randn(shape, device=DEVICE).masked_fill(~allowed, -math.inf)
    given, mask = {
        "causal": (None, None), "all": (None, allowed), "boolean": (allowed, allowed), "additive": (bias, bias),
    }[kind]  # fmt: skip
    compare(inputs, given, mask)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.float32, head_dim) for head_dim in (64, 80, 96, 128)),
        *((dtype, head_dim) for dtype in (torch.bfloat16, torch.float16) for head_dim in (64, 128)),
    ],
)
def test_the_blocks_that_are_used(dtype: torch.dtype, head_dim: int) -> None:
    inputs = draw(1, 1, 1, 140, 140, head_dim, dtype)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    compare(inputs, None, scaling=head_dim**-0.5, tolerance=tolerance, tied=None if dtype == torch.float32 else 0.1)


@pytest.mark.usefixtures("_small_blocks")
def test_equal_scores_send_the_gradient_to_the_first() -> None:
    """Keys 3, 20 and 40, of one block and of another, have the largest scores; integers, so that they are equal."""
    query, key, value = draw(1, 1, 1, 20, 45, 64)
    with torch.no_grad():
        query.copy_(torch.randint(0, 4, query.shape))
        key.copy_(torch.randint(-3, 4, key.shape))
        key[0, 0, [3, 20, 40]] = 4.0
    out = triton_max_shift_attention(query, key, value, None, is_causal=False, scaling=0.35)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (query, key, value), grad)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    scores = 0.35 * exact[0] @ exact[1].transpose(2, 3)
    shifted = torch.exp(scores - scores[..., 3:4])
    expected = shifted / (1 + shifted.sum(dim=-1, keepdim=True)) @ exact[2]
    for a, b in zip(mine, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_rows_that_see_nothing_are_zero(kind: str) -> None:
    inputs = draw(2, 1, 1, 24, 24, 64)
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool, device=DEVICE).tril()
    mask[0, 0, [0, 20]] = False
    mask[1] = False
    given = mask if kind == "boolean" else torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -math.inf)
    out = triton_max_shift_attention(*inputs, given, is_causal=False, scaling=0.35)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    for x in (out, gradients[0]):
        assert x.isfinite().all()
        assert (x[0][:, [0, 20]] == 0).all()
        assert (x[1] == 0).all()
    assert all((x[1] == 0).all() for x in gradients)
    compare(inputs, given, mask)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits(level: float, dtype: torch.dtype) -> None:
    """Scores of a row are about `level`: nothing overflows, and what rounding leaves of their differences counts."""
    query, key, value = draw(1, 1, 2, 40, 40, 64, dtype)
    with torch.no_grad():
        query.copy_(level / 0.35 / 64 * (1 + 1e-3 * torch.randn(query.shape)))
        key.copy_(1 + 0.01 * torch.randn(key.shape))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    # A score is as exact as a float32 of its size.
    compare((query, key, value), None, tolerance=rounding + 2**-22 * abs(level))


@pytest.mark.usefixtures("_small_blocks")
def test_inputs_of_any_layout() -> None:
    """Last dimensions that are no neighbors, keys cut out of a longer cache, expanded gradients."""
    query, key, value = draw(1, 1, 2, 40, 60, 64)
    turned = query.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    found = []
    for q, k, v in (
        (turned, key[:, :, :40], value[:, :, :40]),
        (query, key[:, :, :40].clone(), value[:, :, :40].clone()),
    ):
        out = triton_max_shift_attention(q, k, v, None, is_causal=True, scaling=0.35)
        found.append([out, *torch.autograd.grad(out.sum(), (q, key, value))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_layer_takes_the_kernel_on_cuda() -> None:
    if DEVICE != "cuda":
        pytest.skip("PyTorch sees no CUDA device here")
    query, key, value = draw(2, 2, 3, 300, 300, 64, torch.bfloat16)
    layer = OutlierFreeAttention(SPEC, hidden=6 * 64, heads=6, head_dim=64, like=query)
    out = layer(query, key, value, None, scaling=0.125)[0]
    mine = triton_max_shift_attention(query, key, value, None, is_causal=True, scaling=0.125)
    assert torch.equal(out.transpose(1, 2), mine)
    torch.cuda.reset_peak_memory_stats()
    longer = draw(1, 1, 1, 32768, 32768, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    triton_max_shift_attention(*longer, None, is_causal=True, scaling=0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # a square would be 2 GB


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code, by a process in which Triton does not interpret, and with shared memory that is there."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for capability, name, shared, code in lines:
        # What a program may have on compute capability 8.6, of the same instructions as 8.0, and on 9.0.
        assert 0 < int(shared) <= ({"80": 99, "90": 227}[capability] << 10), name
        assert int(code) > 1000, name
