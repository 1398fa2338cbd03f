"""Scales trained against the float model: what is trained is what comes out, and it comes closer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.models.families import named_linears
from sparq.quantization import (
    QuantizationScheme,
    QuantizedLinear,
    load_quantized,
    quantize,
    save_quantized,
    to_integers,
)
from sparq.quantization.distillation import Example, _backward, _TrainedLinear, float_examples
from sparq.quantization.grid import Grid
from sparq.quantization.straight_through import pass_through


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(seed))


def masked(seed: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": ids(seed), "attention_mask": mask}


@torch.no_grad()
def divergence(model: PreTrainedModel, quantized: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """The mean of KL over the tokens that are not padding, from all logits at once."""
    return float(divergences(model, quantized, batch)[batch["attention_mask"].bool()].mean())


@torch.no_grad()
def divergences(model: PreTrainedModel, quantized: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """KL of every position, [batch, length]."""
    wanted, got = (
        m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
        for m in (model, quantized)
    )
    return (wanted.exp() * (wanted - got)).sum(-1)


def scheme(**changes: Any) -> QuantizationScheme:
    return QuantizationScheme.from_dict({"method": "best", "weight_bits": 4, "activation_bits": 4, **changes})


def rounded_layer(bits: int = 4, group_size: int | None = None) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.round_to_nearest(nn.Linear(16, 8), scheme(weight_bits=bits, group_size=group_size))


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_training_starts_from_the_given_layer(bits: int, group_size: int | None) -> None:
    start = rounded_layer(bits, group_size)
    trained = _TrainedLinear(start, None, torch.Generator())
    x = torch.randn(5, 16)
    torch.testing.assert_close(trained(x), start(x), rtol=1e-6, atol=1e-6)
    finished = trained.finished(bits)
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, finished.state_dict()[name]), name


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("group_size", [None, 4])
def test_a_trained_layer_is_what_comes_out(group_size: int | None, rank: int | None) -> None:
    trained = _TrainedLinear(rounded_layer(group_size=group_size), rank, torch.Generator())
    with torch.no_grad():
        trained.gain.add_(0.1 * torch.randn_like(trained.gain))
        if trained.b is not None:
            trained.b.add_(0.1 * torch.randn_like(trained.b))
    x = torch.randn(5, 16)
    torch.testing.assert_close(trained(x), trained.finished(4)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 4])
def test_gradients_are_those_of_a_layer_without_rounding(group_size: int | None) -> None:
    start = rounded_layer(group_size=group_size)
    trained = _TrainedLinear(start, None, torch.Generator())
    x = torch.randn(5, 16, requires_grad=True)
    trained(x).square().sum().backward()
    # A plain product of what the layer sees: the rounding of inputs passes the gradient on.
    seen = start.seen(x).detach().requires_grad_()
    weight = start.dense_weight().clone().requires_grad_()
    functional.linear(seen, weight, start.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, seen.grad)
    of_gain = (weight.grad * weight.detach()).view(8, -1, group_size or 16).sum(-1)
    torch.testing.assert_close(trained.gain.grad, of_gain)


def test_pass_through_returns_the_value_and_the_gradient() -> None:
    x = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    y = pass_through(x, torch.arange(3.0))
    assert torch.equal(y, torch.arange(3.0))
    (y * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16))


def test_the_loss_is_the_mean_divergence_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.quantization.distillation._CHUNK", 7)
    model, other = convert(tiny_model("llama"), "vanilla"), convert(tiny_model("llama"), "vanilla")
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = masked()
    (example,) = float_examples(model, [batch])
    assert example.target.shape[0] == int(batch["attention_mask"].sum())
    loss = _backward(other, example)
    assert loss == pytest.approx(divergence(model, other, batch), rel=0.05)  # the loss is computed in bfloat16
    assert other.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def labeled() -> dict[str, Tensor]:
    """Four rows: the last three tokens of 16 count, the last five of 9, one alone that has one before it, and none."""
    labels = torch.full((4, 16), -100)
    batch = masked()
    labels[0, 13:] = batch["input_ids"][0, 13:]
    labels[1, 4:] = batch["input_ids"][1, 4:]  # padding after 9 does not count, whatever its labels
    labels[2, :2] = batch["input_ids"][2, :2]
    return {**batch, "labels": labels}


def test_labels_say_what_counts_and_sequences_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.quantization.distillation._CHUNK", 4)
    model, other = convert(tiny_model("llama"), "vanilla"), convert(tiny_model("llama"), "vanilla")
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = labeled()
    (example,) = float_examples(model, [batch, {**batch, "labels": torch.full((4, 16), -100)}])
    assert len(example.target) == 3 + 5 + 1
    of_each = divergences(model, other, batch)
    expected = torch.stack([of_each[0, 12:15].mean(), of_each[1, 3:8].mean(), of_each[2, 0]]).mean()
    assert _backward(other, example) == pytest.approx(float(expected), rel=0.05)


def test_the_gradient_is_that_of_what_counts() -> None:
    model, other = convert(tiny_model("llama"), "vanilla"), convert(tiny_model("llama"), "vanilla")
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = labeled()
    (example,) = float_examples(model, [batch])
    other.requires_grad_(False)
    found = other.model.layers[1].mlp.up_proj.weight.requires_grad_()
    _backward(other, example)
    gradient, found.grad = found.grad, None
    wanted, got = (
        m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for m in (model, other)
    )
    of_each = (wanted.detach().exp() * (wanted.detach() - got)).sum(-1)
    torch.stack([of_each[0, 12:15].mean(), of_each[1, 3:8].mean(), of_each[2, 0]]).mean().backward()
    assert float((gradient - found.grad).norm() / found.grad.norm()) < 0.05  # in bfloat16


@pytest.mark.parametrize("attention", ["vanilla", "softmax1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_comes_closer_to_the_float_model(family: str, attention: str, tmp_path: Path) -> None:
    model = convert(tiny_model(family), attention)
    batch = masked()
    lost = {}
    for method, changes in (("rotation", {}), ("best", {"epochs": 40, "scale_rate": 0.01})):
        quantized = quantize(model, [batch], method=method, weight_bits=3, activation_bits=4, **changes)
        lost[method] = divergence(model, quantized, batch)
    assert lost["best"] < 0.8 * lost["rotation"]
    save_quantized(quantized, tmp_path / "model")
    again = load_quantized(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, quantized(**batch).logits)
    assert all(isinstance(layer, QuantizedLinear) for _, layer in named_linears(quantized))


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("family", ["llama", "opt_350m", "gpt_neox"])
def test_low_rank_beside_the_integers(family: str, group_size: int | None, tmp_path: Path) -> None:
    """It comes closer than scales alone, is saved, and is in the sum that exact integers give."""
    model = convert(tiny_model(family), "softmax1")
    batch = masked()
    lost = {}
    for rank in (None, 8):
        settings = {"weight_bits": 2, "activation_bits": 4, "epochs": 40, "scale_rate": 0.01, "low_rank_rate": 0.01}
        quantized = quantize(model, [batch], method="best", low_rank=rank, group_size=group_size, **settings)
        lost[rank] = divergence(model, quantized, batch)
    assert lost[8] < 0.8 * lost[None]
    save_quantized(quantized, tmp_path / "model")
    again = load_quantized(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, quantized(**batch).logits)
    name, layer = next(iter(named_linears(again)))
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer.integer_forward(x).float(), layer(x), rtol=1e-4, atol=1e-5)
    without = QuantizedLinear.integer_forward(layer.rounded(grid_of(layer), layer.weight), x)
    expected = x @ layer.low_rank_a.T @ layer.low_rank_b.T
    torch.testing.assert_close((layer.integer_forward(x) - without).float(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(SparqError, match=f"{name} has a low_rank part, which has no integers"):
        to_integers(again)
    with pytest.raises(SparqError, match="low_rank is for the method best with weights of 2 to 8 bits, not for w4a4-"):
        QuantizationScheme.from_dict({"method": "gptq", "weight_bits": 4, "activation_bits": 4, "low_rank": 4})


def grid_of(layer: QuantizedLinear) -> Grid:
    assert layer.weight_scale is not None
    return Grid(scale=layer.weight_scale, zero_point=layer.weight_zero_point, bits=2)


def test_the_same_seed_gives_the_same_integers() -> None:
    model = tiny_model("llama")
    first, second = (quantize(model, [ids(), ids(1)], scheme(epochs=3)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(SparqError, match="best trains the scales of GPTQ's integers: rounding cannot be 'nearest'"):
        scheme(rounding="nearest")
    with pytest.raises(SparqError, match="w4a4-best needs calibration data"):
        quantize(model, scheme=scheme())
    with pytest.raises(SparqError, match="the calibration data has no tokens"):
        quantize(model, [], scheme())
    with pytest.raises(SparqError, match="scale_rate is 0; it must be a number more than 0 to 1"):
        scheme(scale_rate=0)
    with pytest.raises(SparqError, match=r"batch 0 has labels of shape \[4, 15\] for ids of shape \[4, 16\]"):
        quantize(model, [{"input_ids": ids(), "labels": ids()[:, 1:]}], scheme())
    with pytest.raises(SparqError, match="none of the calibration data's tokens counts: all labels are -100"):
        quantize(model, [{"input_ids": ids(), "labels": torch.full((4, 16), -100)}], scheme())
    empty = Example(ids(), torch.ones(4, 16), torch.ones(4, 16) / 64, torch.full((64, 32), torch.nan))
    assert not torch.isfinite(torch.tensor(_backward(model.requires_grad_(True), empty)))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(SparqError, match="output is NaN or infinite on calibration batch 0"):
        quantize(model, [ids()], scheme())
