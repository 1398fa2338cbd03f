"""Quantization inside of the attention against transformers' models with a slow attention, in float64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithFlattening,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from model_families import FAMILIES, logits, tiny_model
from sparq.errors import SparqError
from sparq.models import convert, converted_layers
from sparq.quantization import QuantizationScheme, export_compressed_tensors, load_quantized, quantize, save_quantized
from sparq.quantization.attention import AttentionQuantizer

BITS = {"query_bits": 6, "key_bits": 4, "value_bits": 3, "probability_bits": 5}
OFF = {"method": "rtn", "weight_bits": 16, "activation_bits": 16}


def slow_rounding(x: Tensor, bits: int, size: int) -> Tensor:
    """Every group of every head of every token for itself, in numpy's float32."""
    if bits == 16:
        return x
    rows = x.detach().numpy().astype(np.float32).reshape(-1, size)
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        low, high = np.float32(min(row.min(), 0)), np.float32(max(row.max(), 0))
        scale = (high - low) / np.float32(2**bits - 1) if high > low else np.float32(1)
        zero = -np.rint(low / scale)
        out[i] = (np.clip(np.rint(row / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return torch.from_numpy(out.reshape(x.shape)).to(x.dtype)


def slow_attention(settings: dict[str, Any], variant: str) -> Any:
    def attention(
        _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_kwargs: object
    ) -> tuple[Tensor, None]:
        head_dim = query.shape[-1]
        size = settings.get("attention_group_size") or head_dim
        if settings.get("key_rotation"):
            hadamard = torch.from_numpy(scipy.linalg.hadamard(head_dim) / head_dim**0.5)
            query, key = query @ hadamard, key @ hadamard
        query = slow_rounding(query, settings.get("query_bits", 16), size)
        key = slow_rounding(key, settings.get("key_bits", 16), size)
        value = slow_rounding(value, settings.get("value_bits", 16), size)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.mT * scaling + mask[..., : key.shape[2]]
        if variant == "max_shift":
            scores = scores - scores.amax(-1, keepdim=True)
        exponentials = scores.exp()
        p = exponentials / (exponentials.sum(-1, keepdim=True) + (variant != "vanilla"))
        if "probability_bits" in settings:
            steps = 2 ** settings["probability_bits"] - 1
            p = torch.from_numpy(np.rint(p.numpy() * steps) / steps)
        return (p @ value).transpose(1, 2), None

    return attention


def slow_logits(model: PreTrainedModel, settings: dict[str, Any], variant: str, ids: Tensor) -> Tensor:
    theirs = copy.deepcopy(model)
    AttentionInterface.register("slow", slow_attention(settings, variant))
    AttentionMaskInterface.register("slow", eager_mask)
    theirs.set_attn_implementation("slow")
    return logits(theirs, ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("vanilla", BITS),
        ("vanilla", {"key_bits": 4, "value_bits": 4, "attention_group_size": 4, "key_rotation": True}),
        ("softmax1", BITS),
        ("softmax1", {"key_bits": 2, "query_bits": 8}),
        ("max_shift", {**BITS, "key_rotation": True}),
        ("max_shift", {"value_bits": 2}),
    ],
)
def test_it_is_the_slow_attention(family: str, variant: str, settings: dict[str, Any], ids: Tensor) -> None:
    model = tiny_model(family).double()
    expected = slow_logits(model, settings, variant, ids)
    quantized = quantize(convert(model, variant), **OFF, **settings)
    torch.testing.assert_close(logits(quantized, ids), expected, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(logits(model, ids), expected, rtol=1e-3), "the setting does nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "variant", ["vanilla", "softmax1", "max_shift", "softmax1+clipped", "learned_sink", "gated", "l1"]
)
def test_a_rotation_changes_nothing_in_floating_point(family: str, variant: str, ids: Tensor) -> None:
    model = convert(tiny_model(family), variant)
    before = logits(model, ids)
    for layer in converted_layers(model):
        layer.quantizer = AttentionQuantizer(rotates=True)
    assert (logits(model, ids) - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["vanilla", "softmax1", "max_shift"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_give_the_full_pass(family: str, variant: str, cache: str, ids: Tensor) -> None:
    model = convert(tiny_model(family).double(), variant)
    quantized = quantize(model, **OFF, **BITS, key_rotation=True)
    kept = StaticCache(config=model.config, max_cache_len=24) if cache == "static" else None
    with torch.no_grad():
        output = quantized(ids[:, :9], past_key_values=kept, use_cache=True)
        steps = [output.logits]
        for position in range(9, 16):
            output = quantized(ids[:, [position]], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(quantized, ids), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "softmax1"])
def test_files_give_the_same_logits(family: str, attention: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    if attention != "sdpa":
        convert(model, attention)
    scheme = QuantizationScheme.from_dict(
        {"method": "rotation", "weight_bits": 4, "activation_bits": 4, **BITS, "attention_group_size": 8}
    )
    quantized = quantize(model, [ids], scheme)
    assert scheme.key_rotation
    assert model.config._attn_implementation == ("sdpa" if attention == "sdpa" else "sparq")
    save_quantized(quantized, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert torch.equal(logits(loaded, ids), logits(quantized, ids))
    expected = AttentionQuantizer(**BITS, group_size=8, rotates=True)
    assert [layer.quantizer for layer in converted_layers(loaded)] == [expected] * 2


def test_in_bfloat16_types_stay(ids: Tensor) -> None:
    quantized = quantize(tiny_model("llama").bfloat16(), **OFF, **BITS)
    assert logits(quantized, ids).dtype == torch.bfloat16
    query, key, value = torch.randn(3, 1, 2, 5, 8).bfloat16()
    rounded = AttentionQuantizer(**{**BITS, "rotates": True}).inputs(query, key, value)
    assert [x.dtype for x in rounded] == [torch.bfloat16] * 3


def test_probabilities_by_hand() -> None:
    p = torch.tensor([0.0, 0.16, 0.17, 0.5, 0.84, 1.0])
    expected = torch.tensor([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])  # 0.5 is a tie of 1 and 2: half to even
    assert torch.equal(AttentionQuantizer(probability_bits=2).probabilities(p), expected)
    assert AttentionQuantizer().probabilities(p) is p


def test_a_rotation_tames_a_large_channel() -> None:
    key = torch.randn(1, 2, 50, 64)
    key[..., 5] *= 40
    errors = {}
    query = torch.randn(1, 2, 50, 64)
    for rotates in (False, True):
        left, right, _ = AttentionQuantizer(key_bits=4, rotates=rotates).inputs(query, key, key)
        errors[rotates] = float((left @ right.mT - query @ key.mT).square().mean())
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_bits": 9}, "key_bits is 9; it must be 2 to 8, or 16"),
        ({"probability_bits": 1}, "probability_bits is 1; it must be 2 to 8"),
        ({"key_bits": 4, "attention_group_size": 3}, "attention_group_size 3 does not divide the 8 channels of a head"),
        ({"attention_group_size": 0}, "attention_group_size is 0; it must be a positive number of channels"),
        ({"key_rotation": 1}, "key_rotation is 1; it must be true or false"),
    ],
)  # fmt: skip
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        quantize(tiny_model("llama"), **OFF, **settings)


def test_an_attention_from_elsewhere_is_refused() -> None:
    model = tiny_model("llama")
    AttentionInterface.register("slow", slow_attention({}, "vanilla"))
    model.set_attn_implementation("slow")
    with pytest.raises(SparqError, match="attention 'slow' cannot be quantized"):
        quantize(model, **OFF, key_bits=4)


def test_export_refuses(tmp_path: Path) -> None:
    quantized = quantize(tiny_model("llama"), method="rtn", weight_bits=8, activation_bits=8, value_bits=4)
    with pytest.raises(SparqError, match="attention is quantized inside"):
        export_compressed_tensors(quantized, tmp_path / "out")


def test_names_have_the_cache() -> None:
    scheme = QuantizationScheme(method="rtn", weight_bits=4, activation_bits=8, key_bits=3, value_bits=3)
    assert scheme.name == "w4a8kv3-rtn"


@pytest.mark.parametrize("variant", ["vanilla", "softmax1", "max_shift"])
@pytest.mark.parametrize("settings", [BITS, {"key_bits": 3, "value_bits": 3}])
def test_packed_documents_are_each_document(variant: str, settings: dict[str, Any], ids: Tensor) -> None:
    quantized = quantize(convert(tiny_model("llama").double(), variant), **OFF, **settings)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row[:9].tolist()} for row in ids])
    del batch["labels"]
    with torch.no_grad():
        together = quantized(**batch, use_cache=False).logits
    alone = torch.cat([logits(quantized, row[None, :9]) for row in ids], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=1e-9)
