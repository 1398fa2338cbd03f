"""Fixed ranges of activations, and ranges of channels and groups, against slow references."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_families import FAMILIES, logits, tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.models.families import decoder_blocks, named_linears
from sparq.quantization import (
    QuantizationScheme,
    QuantizedLinear,
    export_compressed_tensors,
    load_quantized,
    quantize,
    save_quantized,
    to_integers,
)
from sparq.quantization.static_ranges import MSE_VALUES, SHARES, static_scale

STATIC = {"method": "rtn", "weight_bits": 16, "activation_bits": 8, "activation_granularity": "tensor"}
CHANNEL = {**STATIC, "activation_granularity": "channel", "activation_static": "max"}


def inputs_of(model: PreTrainedModel, batches: list[Tensor]) -> dict[str, Tensor]:
    """All inputs of every linear layer of the float model, flat tokens by channels."""
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in named_linears(model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, layer in named_linears(model)
    ]
    for ids in batches:
        logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(pieces) for name, pieces in seen.items()}


def rounded(x: np.ndarray, low: float, high: float, bits: int, *, symmetric: bool) -> np.ndarray:
    """Onto the grid of a range, in float64."""
    if symmetric:
        step = max(high, -low) / (2 ** (bits - 1) - 1)
        return np.clip(np.rint(x / step), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) * step
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_those_of_the_float_model(family: str, symmetric: bool, ids: Tensor) -> None:
    model = convert(tiny_model(family), "softmax1")
    batches = [ids, torch.randint(3, 96, (1, 9))]
    seen = inputs_of(model, batches)
    quantized = quantize(model, batches, **STATIC, activation_static="max", activation_symmetric=symmetric)
    for name, layer in named_linears(quantized):
        assert isinstance(layer, QuantizedLinear)
        low, high = min(float(seen[name].min()), 0), max(float(seen[name].max()), 0)
        step = max(high, -low) / 127 if symmetric else (high - low) / 255
        assert layer.activation_scale is not None
        assert float(layer.activation_scale) == pytest.approx(step, rel=1e-4)
        x = seen[name][:5]
        expected = rounded(x.double().numpy(), low, high, 8, symmetric=symmetric)
        off = np.abs(layer.seen(x).double().numpy() - expected) / step
        assert (off < 0.01).mean() > 0.99  # values between two steps may go either way
        assert off.max() < 1.01


@pytest.mark.parametrize("method", ["rtn", "gptq", "rotation", "smoothquant"])
@pytest.mark.parametrize("static", ["max", "percentile", "mse"])
def test_static_ranges_do_not_depend_on_the_batch(method: str, static: str, ids: Tensor) -> None:
    settings = {"method": method, "weight_bits": 4, "activation_bits": 6, "activation_granularity": "tensor"}
    quantized = quantize(tiny_model("llama"), [ids], **settings, activation_static=static)
    # The same numbers of rows, for a product rounds by its shape.
    other = torch.stack([ids[0], torch.randint(3, 96, (16,))])
    assert torch.equal(logits(quantized, ids)[0], logits(quantized, other)[0])
    dynamic = quantize(tiny_model("llama"), [ids], **settings)
    assert not torch.equal(logits(dynamic, ids)[0], logits(dynamic, other)[0])


@given(
    st.integers(2, 8),
    st.booleans(),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([0.001, 0.05, 0.3]),
    st.integers(0, 100),
)
def test_percentiles_are_exact(bits: int, symmetric: bool, rows: list[int], tail: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    seen = [torch.randn(count, 7, generator=random) ** 3 for count in rows]
    scheme = QuantizationScheme(
        method="rtn", weight_bits=16, activation_bits=bits, activation_symmetric=symmetric,
        activation_granularity="tensor", activation_static="percentile", activation_tail=tail,
    )  # fmt: skip
    scale, offset = static_scale(seen, scheme)
    ordered = np.sort(torch.cat(seen).flatten().numpy())
    out = int(len(ordered) * tail / 2)
    low, high = ordered[out], ordered[len(ordered) - 1 - out]
    if symmetric:
        assert float(scale) == pytest.approx(max(high, -low) / (2 ** (bits - 1) - 1), rel=1e-6)
        assert offset is None
    else:
        assert float(scale) == pytest.approx((max(high, 0) - min(low, 0)) / (2**bits - 1), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_takes_the_best_share(bits: int, symmetric: bool) -> None:
    seen = [torch.randn(30, 16) ** 5, torch.randn(20, 16) ** 5]
    scheme = QuantizationScheme(
        method="rtn", weight_bits=16, activation_bits=bits, activation_symmetric=symmetric,
        activation_granularity="tensor", activation_static="mse",
    )  # fmt: skip
    scale, offset = static_scale(seen, scheme)
    x = torch.cat(seen).double().numpy()
    errors = [
        np.square(rounded(x, x.min() * share, x.max() * share, bits, symmetric=symmetric) - x).mean()
        for share in SHARES.tolist()
    ]
    step = float(scale)
    zero = 0.0 if offset is None else float(offset)
    smallest = -(2 ** (bits - 1)) + (offset is None)
    mine = (np.clip(np.rint(x / step) + zero, smallest, 2 ** (bits - 1) - 1) - zero) * step
    assert np.square(mine - x).mean() == pytest.approx(min(errors), rel=1e-3)
    assert x.size < MSE_VALUES


def linear(**settings: Any) -> tuple[QuantizedLinear, nn.Linear]:
    plain = nn.Linear(24, 10)
    scheme = QuantizationScheme(method="rtn", **settings)
    return QuantizedLinear.round_to_nearest(plain, scheme), plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weight_bits", [16, 5])
@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_groups_of_a_token(symmetric: bool, weight_bits: int, bits: int) -> None:
    layer, _ = linear(
        weight_bits=weight_bits, activation_bits=bits, group_size=8, activation_granularity="group",
        activation_symmetric=symmetric, weight_symmetric=False,
    )  # fmt: skip
    x = torch.randn(2, 3, 24)
    expected = np.stack(
        [rounded(row, row.min(), row.max(), bits, symmetric=symmetric) for row in x.double().numpy().reshape(-1, 8)]
    ).reshape(x.shape)
    np.testing.assert_allclose(layer.seen(x).numpy(), expected, rtol=1e-5, atol=1e-6)
    if weight_bits != 16:
        torch.testing.assert_close(layer(x).double(), layer.integer_forward(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["vanilla", "softmax1+gated"])
def test_channels_are_divided_exactly(family: str, attention: str, ids: Tensor) -> None:
    model = convert(tiny_model(family), attention)
    before = logits(model, ids)
    seen = inputs_of(model, [ids])
    quantized = quantize(model, [ids], **CHANNEL)
    for name, layer in named_linears(quantized):
        assert isinstance(layer, QuantizedLinear)
        assert float(layer.activation_scale) == pytest.approx(1 / 127, rel=1e-3)
        original = model.get_submodule(name).weight
        factor = seen[name].abs().amax(0).clamp(min=1e-5)
        torch.testing.assert_close(layer.weight, original * factor, rtol=1e-3, atol=1e-4)
        layer.activation_bits = 16
    assert (logits(quantized, ids) - before).norm() <= 1e-5 * before.norm()


def test_channels_of_a_pre_norm_model_are_folded(ids: Tensor) -> None:
    quantized = quantize(tiny_model("llama"), [ids], **CHANNEL)
    block = decoder_blocks(quantized)[0]
    divided = {name for name, layer in block.named_modules() if getattr(layer, "input_scale", None) is not None}
    assert divided == {"self_attn.o_proj", "mlp.down_proj"}


def test_channels_help_where_one_is_large(ids: Tensor) -> None:
    model = tiny_model("llama")
    for block in decoder_blocks(model):
        block.input_layernorm.weight.data[3] = 60.0
        block.self_attn.q_proj.weight.data[:, 3] /= 60
    before = logits(model, ids)
    errors = {}
    for granularity in ("tensor", "channel"):
        settings = {**STATIC, "activation_bits": 6, "activation_granularity": granularity, "activation_static": "max"}
        errors[granularity] = float((logits(quantize(model, [ids], **settings), ids) - before).norm())
    assert errors["channel"] < 0.7 * errors["tensor"]


SCHEMES: list[dict[str, Any]] = [
    {**STATIC, "activation_static": "mse", "weight_bits": 4, "activation_symmetric": False},
    {**STATIC, "method": "rotation", "activation_static": "percentile", "weight_bits": 4, "activation_bits": 4},
    {**CHANNEL, "method": "gptq", "weight_bits": 4},
    {**STATIC, "activation_granularity": "group", "group_size": 8, "weight_bits": 3, "activation_bits": 5},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SCHEMES)
def test_files_give_the_same_logits(family: str, settings: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    quantized = quantize(tiny_model(family), [ids], **settings)
    save_quantized(quantized, tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model"), ids), logits(quantized, ids))


@pytest.mark.parametrize("settings", SCHEMES)
def test_integers_accumulate_the_same(settings: dict[str, Any], ids: Tensor) -> None:
    quantized = quantize(tiny_model("llama"), [ids], **settings)
    layer = decoder_blocks(quantized)[0].mlp.down_proj
    x = torch.randn(6, 48)
    expected = layer.accumulators(x)
    simulated = layer(x)
    to_integers(quantized)
    fast = decoder_blocks(quantized)[0].mlp.down_proj
    assert torch.equal(fast.accumulators(x).permute(1, 2, 0), expected)
    torch.testing.assert_close(fast(x), simulated, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported(ids: Tensor, tmp_path: Path) -> None:
    quantized = quantize(tiny_model("llama"), [ids], **{**SCHEMES[0], "weight_bits": 8})
    with pytest.raises(SparqError, match="export needs ranges of activations at run time"):
        export_compressed_tensors(quantized, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_granularity": "token", "activation_static": "max"}, "must be 'tensor' or 'channel', not 'token'"),
        ({"activation_static": "maximum"}, "unknown static activation range 'maximum': did you mean 'max'"),
        ({"activation_granularity": "channel"}, "'channel' is static: set activation_static to max, percentile or mse"),
        ({**CHANNEL, "method": "smoothquant"}, "'channel' goes with rtn and gptq: smoothquant changes channels"),
        ({"activation_granularity": "group"}, "shares group_size with the weights, but group_size is null"),
        ({"activation_granularity": "group", "group_size": 7}, "group_size 7 does not divide the 32 input features"),
        ({"method": "omniquant", "activation_static": "max"}, "omniquant trains with ranges at run time"),
        ({"activation_static": "max"}, "w16a8-rtn needs calibration data"),
        ({"activation_tail": 0.6}, "activation_tail is 0.6; it must be a number more than 0 to 0.5"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        quantize(tiny_model("llama"), None, **{**STATIC, **settings})
