"""Frozen layers in few bits: rounding, one function with a gradient, memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaptation_data import BASES, relative
from model_families import tiny_model
from sparq.adaptation import (
    LoraSettings,
    add_lora,
)
from sparq.adaptation.quantized_base import frozen
from sparq.adaptation.settings import Base
from sparq.errors import SparqError


def normal_float_codes() -> Tensor:
    """QLoRA's 16 levels: quantiles of N(0, 1), 8 above zero and 7 below it, zero itself, scaled to [-1, 1]."""
    edge = 0.9677083  # between 1 - 1/30 and 1 - 1/32: the outermost quantiles are not infinite
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return codes / codes.abs().max()


def test_nf4_takes_the_nearest_quantile() -> None:
    weight = torch.randn(48, 128)
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = normal_float_codes()
    nearest = codes[(blocks / largest).unsqueeze(-1).sub(codes).abs().argmin(-1)] * largest
    torch.testing.assert_close(frozen(weight, "nf4").dequantized().double().view(-1, 64), nearest, atol=1e-5, rtol=1e-5)
    double = frozen(weight, "nf4-double").dequantized()
    # Scales in 8 bits: a percent of a weight, where a level of NF4 is far more.
    assert 0 < relative(double, frozen(weight, "nf4").dequantized()) < 0.01


def test_int8_takes_the_nearest_of_255_steps() -> None:
    weight = torch.randn(48, 128)
    step = weight.abs().amax(1, keepdim=True) / 127
    # bitsandbytes rounds to float16 first, 2^-11 of a weight, so that ties may fall to either side.
    error = (frozen(weight, "int8").dequantized() - weight).abs()
    assert (error <= step / 2 + weight.abs() * 2**-10 + step * 127 * 2**-10).all()
    assert error.max() > step.min() / 3


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_is_one_function_with_a_gradient(base: Base, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(64, 128), torch.randn(64)
    layer = frozen(weight, base, bias.to(dtype))
    x = torch.randn(2, 5, 128, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = functional.linear(x.float(), layer.dequantized(), bias.to(dtype).float())
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert relative(evaluated.float(), expected) < tolerance
    # bitsandbytes' own layers give no gradient, or another output, once they were evaluated.
    seen = x.clone().requires_grad_()
    trained = layer.train()(seen)
    assert torch.equal(trained, evaluated)
    upstream = torch.randn_like(trained)
    trained.backward(upstream)
    assert seen.grad is not None
    assert relative(seen.grad.float(), upstream.float() @ layer.dequantized()) < tolerance


@pytest.mark.parametrize(("base", "most"), [("int8", 0.55), ("nf4", 0.35), ("nf4-double", 0.35)])
def test_memory_of_a_frozen_layer(base: Base, most: float) -> None:
    """At SmolLM2's width, scales included, against bfloat16."""
    layer = frozen(torch.randn(576, 576), base)
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert 576 * 576 * 2 * (0.25 if base != "int8" else 0.5) < size < 576 * 576 * 2 * most


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.adaptation.quantized_base.find_spec", lambda name: None)
    with pytest.raises(SparqError, match=r"a base in nf4 needs bitsandbytes: pip install 'sparq\[qlora\]'"):
        add_lora(tiny_model("llama"), LoraSettings(rank=2, base="nf4"))
