"""Products of bfloat16 by way of float32: what processors with such instructions give."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparq import bfloat16
from sparq.bfloat16 import Float32Products, fast_products

Product = Callable[..., Tensor]
PRODUCTS: dict[str, tuple[Product, tuple[tuple[int, ...], ...]]] = {
    "mm": (torch.mm, ((5, 7), (7, 3))),
    "linear": (functional.linear, ((2, 5, 7), (3, 7), (3,))),
    "matmul": (torch.matmul, ((2, 5, 7), (2, 7, 3))),
    "baddbmm": (torch.baddbmm, ((2, 5, 3), (2, 5, 7), (2, 7, 3))),
    "addmm_": (lambda total, x, y: total.clone().addmm_(x, y), ((5, 3), (5, 7), (7, 3))),
    "conv1d": (functional.conv1d, ((2, 4, 9), (6, 4, 3), (6,))),
    "attention": (functional.scaled_dot_product_attention, ((1, 2, 9, 8),) * 3),
}


def run(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of a product of the same bfloat16 numbers, computed in `dtype`."""
    product, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    output = product(*inputs)
    weight = torch.randn(output.shape, generator=generator).bfloat16().to(dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, weight)]


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "attention"])
def test_a_product_is_that_of_float32_rounded_once(name: str) -> None:
    expected = [x.bfloat16() for x in run(name, torch.float32)]
    with Float32Products():
        for got, wanted in zip(run(name, torch.bfloat16), expected, strict=True):
            assert got.dtype == torch.bfloat16
            # Sums over a batch may be rounded once more.
            torch.testing.assert_close(got, wanted, rtol=2**-8, atol=2**-8)


def test_attention_with_its_backward_pass() -> None:
    with Float32Products():
        for got, wanted in zip(run("attention", torch.bfloat16), run("attention", torch.float32), strict=True):
            torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_in_inference_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `linear` arrives whole."""
    layer = nn.Linear(7, 3).bfloat16()
    x = torch.randn(2, 5, 7).bfloat16()
    seen = []
    widened = bfloat16._widened
    monkeypatch.setattr(bfloat16, "_widened", lambda t: seen.append(t.shape) or widened(t))
    with torch.inference_mode(), Float32Products():
        got = layer(x)
    assert seen
    expected = functional.linear(x.float(), layer.weight.float(), layer.bias.float()).bfloat16()
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=2**-8)


def test_other_types_are_left_alone() -> None:
    x, y = torch.randn(5, 7), torch.randn(7, 3)
    with Float32Products():
        assert torch.equal(x @ y, torch.mm(x, y))
        assert (x.double() @ y.double()).dtype == torch.float64


@pytest.mark.parametrize("native", [True, False])
def test_only_where_the_processor_lacks_them(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_native", lambda device: native or device.type == "cuda")
    cpu, small, large = torch.device("cpu"), nn.Linear(10, 10), nn.Linear(500, 500)
    here = contextlib.nullcontext if native else Float32Products
    assert isinstance(fast_products(cpu, torch.bfloat16), here)
    assert isinstance(fast_products(cpu, torch.bfloat16, large), here)
    assert isinstance(fast_products(cpu, torch.bfloat16, small), contextlib.nullcontext)
    assert isinstance(fast_products(cpu, torch.float32, large), contextlib.nullcontext)
    assert isinstance(fast_products(torch.device("cuda"), torch.bfloat16, large), contextlib.nullcontext)
