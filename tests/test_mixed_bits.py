"""Bits of single layers, sensitivity, and mixed bits within a budget."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_families import FAMILIES, logits, tiny_model
from sparq.errors import SparqError
from sparq.models.families import decoder_blocks, named_linears
from sparq.quantization import (
    QuantizationScheme,
    QuantizedLinear,
    export_compressed_tensors,
    load_quantized,
    quantize,
    save_quantized,
    scheme_of,
    to_integers,
)
from sparq.quantization.mixed import quantize_within
from sparq.quantization.quantizer import fake_quantize
from sparq.quantization.sensitivity import parts_of, sensitivity

W4 = {"method": "rtn", "weight_bits": 4, "activation_bits": 8}
DOWN = "model.layers.1.mlp.down_proj"
KEY = "model.layers.0.self_attn.k_proj"


def loss_on(teacher: PreTrainedModel, ids: Tensor) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Mean losses of two halves of the data, on what the float model says: any other model has a larger one."""
    wanted = logits(teacher, ids).softmax(-1)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        losses = -(wanted * logits(model, ids).log_softmax(-1)).sum(-1).mean(1)
        return {"first": float(losses[0]), "second": float(losses[1])}

    return measure


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "gptq", "rotation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_their_own_bits(method: str, family: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    names = [name for name, _ in named_linears(model)]
    layers: dict[str, dict[str, Any]] = {
        names[0]: {"weight_bits": 8},
        names[-1]: {"weight_bits": 2, "activation_bits": 5, "activation_clip": 0.8},
    }
    quantized = quantize(model, [ids], method=method, weight_bits=4, activation_bits=8, layers=layers)
    for name, layer in named_linears(quantized):
        assert isinstance(layer, QuantizedLinear)
        bits = layers.get(name, {}).get("weight_bits", 4)
        used = len(layer.weight.unique())
        assert used <= 2**bits
        assert used > 2 ** (bits - 1) or bits == 8
        assert used > 16 or bits != 8
        assert layer.activation_bits == layers.get(name, {}).get("activation_bits", 8)
        assert (layer.activation_clip == 0.8) == (name == names[-1])
    save_quantized(quantized, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert scheme_of(loaded) == scheme_of(quantized)
    assert torch.equal(logits(loaded, ids), logits(quantized, ids))


def test_the_other_layers_are_as_before(ids: Tensor) -> None:
    plain = dict(named_linears(quantize(tiny_model("llama"), **W4)))
    mixed = dict(named_linears(quantize(tiny_model("llama"), **W4, layers={DOWN: {"weight_bits": 8}})))
    high = dict(named_linears(quantize(tiny_model("llama"), **{**W4, "weight_bits": 8})))
    for name, layer in mixed.items():
        expected = high[name] if name == DOWN else plain[name]
        assert torch.equal(layer.weight, expected.weight), name


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_integers_of_mixed_bits(activation_bits: int, ids: Tensor) -> None:
    settings = {**W4, "activation_bits": activation_bits}
    model = tiny_model("llama")
    if activation_bits == 16:
        model, settings = model.bfloat16(), {**settings, "group_size": None}
    layers: dict[str, Any] = {KEY: {"weight_bits": 8}, "model.layers.1.mlp.up_proj": {"weight_bits": 3}}
    if activation_bits == 8:
        layers[DOWN] = {"activation_bits": 6}
    quantized = quantize(model, **settings, layers=layers)
    if activation_bits == 16:
        with pytest.raises(SparqError, match="has 48 inputs|has groups of|has 16 outputs|has 32 outputs"):
            to_integers(quantized)
        return
    before = logits(quantized, ids)
    after = logits(to_integers(quantized), ids)
    assert (after - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"model.layers.0.mlp.dwon_proj": {"weight_bits": 8}}, "unknown layer 'model.layers.0.mlp.dwon_proj': did you"),
        ({DOWN: {"bits": 8}}, f"unknown setting of layer {DOWN} 'bits'"),
        ({DOWN: {"weight_bits": 9}}, "weight_bits is 9; it must be 2 to 8"),
        ({DOWN: {"weight_bits": 16}}, f"weight_bits of layer {DOWN} is 16 and that of the scheme 4: either both"),
        ({DOWN: 8}, f"layers.{DOWN} is 8; it must be settings"),
        ([DOWN], "it must map names of layers to settings"),
    ],
)  # fmt: skip
def test_mistakes(layers: Any, message: str) -> None:
    with pytest.raises(SparqError, match=message):
        quantize(tiny_model("llama"), **W4, layers=layers)


def test_more_mistakes(ids: Tensor, tmp_path: Path) -> None:
    layers = {DOWN: {"weight_bits": 8}}
    with pytest.raises(SparqError, match="omniquant trains whole blocks with one scheme: layers must be empty"):
        QuantizationScheme(method="omniquant", weight_bits=4, activation_bits=16, layers=layers)
    with pytest.raises(SparqError, match="layers of different bits are not exported"):
        export_compressed_tensors(quantize(tiny_model("llama"), **W4, layers=layers), tmp_path / "out")


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "gptq", "rotation"])
@pytest.mark.parametrize("by", ["layer", "block", "kind"])
def test_sensitivity_is_that_of_one_part(method: str, by: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    scheme = QuantizationScheme.from_dict({"method": method, "weight_bits": 3, "activation_bits": 4, "key_bits": 4})
    measure = loss_on(model, ids)
    report = sensitivity(model, [ids], scheme, measure, by=by)
    assert report.full == pytest.approx(measure(model), abs=1e-4)
    whole = quantize(model, [ids], scheme)
    assert report.quantized == measure(whole)
    assert [part.part for part in report.parts] == list(parts_of(model, by))
    assert len(report.parts) == {"layer": 14, "block": 2, "kind": 7}[by]
    assert sum(part.num_weights for part in report.parts) == sum(x.weight.numel() for _, x in named_linears(model))
    if method != "rtn":
        return
    for part in report.parts[:3]:  # without a change of basis: the plain model with these layers rounded
        expected = quantize(model, **{**W4, "weight_bits": 16, "activation_bits": 16})
        for name in part.layers:
            expected.set_submodule(name, whole.get_submodule(name))
        change = {key: value - report.full[key] for key, value in measure(expected).items()}
        assert part.loss_change == pytest.approx(change, abs=1e-6)
        assert part.worst == max(part.loss_change.values())


def spoilt_model() -> PreTrainedModel:
    """One layer with a weight that ruins its rows' scales."""
    model = tiny_model("llama")
    with torch.no_grad():
        decoder_blocks(model)[1].mlp.down_proj.weight[:, 5] *= 60
    return model


def test_the_one_layer_that_does_not_fit_is_promoted() -> None:
    model = tiny_model("llama").double()
    for name, layer in named_linears(model):
        # All others are on the grid of 4 bits already.
        weight = layer.weight.data * 20 if name == DOWN else fake_quantize(layer.weight.data, 4, symmetric=True)
        layer.weight.data = weight.double()
    measure = loss_on(model, torch.randint(3, 96, (2, 60)))
    scheme = QuantizationScheme(method="rtn", weight_bits=4, activation_bits=16)
    low = measure(quantize(model, scheme=scheme))
    full = measure(model)
    worst = max(low[key] - full[key] for key in full)
    assert worst > 1e-5
    budget = math.expm1(worst / 2)
    found = quantize_within(model, None, scheme, measure, budget=budget, better={"weight_bits": 8})
    assert found.promoted == (DOWN,)
    assert found.scheme.layers[DOWN] == {"weight_bits": 8}


@pytest.mark.parametrize("method", ["rtn", "gptq", "rotation"])
def test_the_budget_is_kept(method: str, ids: Tensor) -> None:
    model = spoilt_model()
    measure = loss_on(model, torch.randint(3, 96, (2, 60)))
    scheme = QuantizationScheme.from_dict({"method": method, "weight_bits": 3, "activation_bits": 16})
    full = measure(model)
    high = measure(quantize(model, [ids], **{**scheme.to_dict(), "weight_bits": 8}))
    low = measure(quantize(model, [ids], scheme))
    rises = [max(other[key] - full[key] for key in full) for other in (high, low)]
    budget = math.expm1(0.7 * max(rises[0], 0) + 0.3 * rises[1])
    found = quantize_within(model, [ids], scheme, measure, budget=budget, better={"weight_bits": 8})
    assert found.measured == measure(found.model)
    assert max(found.measured[key] - full[key] for key in full) <= math.log1p(budget) + 1e-3
    assert 0 < len(found.promoted) < 14
    mixed, least, most = found.weight_bytes
    assert least < mixed < most
    assert 8 * least == 3 * most
    assert {name for name, layer in named_linears(found.model) if len(layer.weight.unique()) > 8} <= set(found.promoted)
    again = quantize(model, [ids], found.scheme)
    assert torch.equal(logits(again, ids), logits(found.model, ids))


@pytest.mark.parametrize("points", [0.0, 20.0])
def test_a_budget_of_error_rates_is_kept(points: float, ids: Tensor) -> None:
    """An error is a position where the most probable token is not that of the float model."""
    model = spoilt_model()
    data = torch.randint(3, 96, (2, 60))
    said = logits(model, data).argmax(-1)

    def error_rates(other: PreTrainedModel) -> dict[str, float]:
        wrong = (logits(other, data).argmax(-1) != said).float().mean(1)
        return {"first": 100 * float(wrong[0]), "second": 100 * float(wrong[1])}

    scheme = QuantizationScheme.from_dict({"method": "rtn", "weight_bits": 3, "activation_bits": 16})
    low = error_rates(quantize(model, scheme=scheme))
    high = error_rates(quantize(model, **{**scheme.to_dict(), "weight_bits": 8}))
    allowed = max(high.values()) + points
    assert max(low.values()) > allowed
    options: Any = {"error_rates": error_rates, "points": allowed, "better": {"weight_bits": 8}}
    found = quantize_within(model, None, scheme, loss_on(model, data), **options)
    assert 0 < len(found.promoted) <= 14
    assert len(found.promoted) < 14 or not points
    assert found.error_rates == {key: (0.0, rate) for key, rate in error_rates(found.model).items()}
    assert max(rate for _, rate in found.error_rates.values()) <= allowed
    both = quantize_within(model, None, scheme, loss_on(model, data), budget=1e-2, **options)
    assert max(both.measured[key] - both.report.full[key] for key in both.measured) <= math.log1p(1e-2)
    with pytest.raises(SparqError, match=r"all layers promoted the error rate of \w+ is .*, in floating point 0.00 %"):
        quantize_within(
            model, None, scheme, loss_on(model, data), better={"weight_bits": 4}, error_rates=error_rates, points=0.0
        )


def test_mistakes_of_budgets(ids: Tensor) -> None:
    model = tiny_model("llama")
    measure = loss_on(model, ids)
    scheme = QuantizationScheme(method="rtn", weight_bits=4, activation_bits=16)
    for settings, message in (
        ({}, "there is no budget: give a share"),
        ({"points": 1.0}, "go together: give both or neither"),
        ({"budget": 0.1, "error_rates": measure}, "go together: give both or neither"),
        ({"points": -1.0, "error_rates": measure}, r"the budget is -1.0 points: it must be 0 or more"),
    ):
        with pytest.raises(SparqError, match=message):
            quantize_within(model, None, scheme, measure, better={"weight_bits": 8}, **settings)  # type: ignore[arg-type]


def test_budgets_that_cannot_be_kept(ids: Tensor) -> None:
    model = tiny_model("llama")
    measure = loss_on(model, ids)
    scheme = QuantizationScheme(method="rtn", weight_bits=2, activation_bits=2)
    with pytest.raises(SparqError, match="with all layers promoted the perplexity of .* needs more bits"):
        quantize_within(model, None, scheme, measure, budget=1e-4, better={"weight_bits": 3})
    with pytest.raises(SparqError, match="the budget is 0: it must be a share above 0"):
        quantize_within(model, None, scheme, measure, budget=0, better={"weight_bits": 3})
    learned = QuantizationScheme(method="omniquant", weight_bits=4, activation_bits=16)
    with pytest.raises(SparqError, match="trains all layers together with their rounding"):
        sensitivity(model, [ids], learned, measure)
    with pytest.raises(SparqError, match="quantizes no linear layer"):
        sensitivity(model, [ids], QuantizationScheme(method="rtn", weight_bits=16, activation_bits=16), measure)
