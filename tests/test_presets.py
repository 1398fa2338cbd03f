"""Presets: what they stand for, what goes before them, and that every one of them works on a model."""

from typing import Any

import pytest
import torch

from model_families import tiny_model
from sparq.errors import SparqError
from sparq.quantization import QuantizationScheme, quantize
from sparq.quantization.presets import PRESETS
from sparq.quantization.quantizer import fake_quantize


def scheme(method: str, bits: int = 4, **changes: Any) -> QuantizationScheme:
    return QuantizationScheme.from_dict({"method": method, "weight_bits": bits, "activation_bits": bits, **changes})


def test_the_papers_settings() -> None:
    assert scheme("smoothquant", preset="paper").smoothing_alpha == 0.5
    assert scheme("omniquant", preset="paper").group_size == 128
    assert scheme("affinequant", preset="paper").stability == 0.01


def test_the_original_code_quantizes_inside_the_attention() -> None:
    smooth, omni = scheme("smoothquant", 8, preset="anchor"), scheme("omniquant", preset="anchor")
    assert [smooth.query_bits, smooth.key_bits, smooth.value_bits, smooth.probability_bits] == [8] * 4
    assert [omni.query_bits, omni.key_bits, omni.value_bits, omni.probability_bits] == [4, 4, 4, 16]
    weights_only = QuantizationScheme.from_dict(
        {"method": "affinequant", "weight_bits": 2, "activation_bits": 16, "preset": "anchor"}
    )
    assert not weights_only.quantizes_attention
    assert (omni.epochs, weights_only.epochs) == (20, 40)


def test_rotated_inputs_are_clipped_by_what_shares_a_range() -> None:
    groups = {"group_size": 64, "activation_granularity": "group"}
    for method in ("rotation", "best"):
        clips = [scheme(method, bits, **more).activation_clip for bits, more in ((4, {}), (4, groups), (8, groups))]
        assert clips == [0.9, 0.95, 1.0]
    assert scheme("gptq", **groups).activation_clip == 1.0
    # Why: of a few normal numbers, the extreme ones are nearer to the rest.
    for columns, best in ((64, 0.95), (576, 0.85)):
        x = torch.randn(2000, columns, generator=torch.Generator().manual_seed(0))
        errors = {
            clip: float((fake_quantize(x, 4, symmetric=False, clip=clip) - x).square().mean())
            for clip in (0.8, 0.85, 0.9, 0.95, 1.0)
        }
        assert min(errors, key=errors.__getitem__) == best


def test_what_is_given_comes_before_the_preset() -> None:
    chosen = scheme("omniquant", preset="anchor", epochs=3, key_bits=16)
    assert (chosen.epochs, chosen.key_bits, chosen.value_bits) == (3, 16, 4)
    assert QuantizationScheme.from_dict(chosen.to_dict()) == chosen


def test_mistakes_are_one_line() -> None:
    with pytest.raises(SparqError, match="unknown preset 'papers': did you mean 'paper'"):
        scheme("omniquant", preset="papers")
    with pytest.raises(SparqError, match="'fast' is for omniquant, affinequant, best, not for 'rtn': leave it out"):
        scheme("rtn", preset="fast")


@pytest.mark.parametrize(("preset", "method"), [(p, method) for p, methods in PRESETS.items() for method in methods])
def test_every_preset_quantizes_a_model(preset: str, method: str) -> None:
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    groups = {"group_size": 8} if (preset, method) == ("paper", "omniquant") else {}
    made = quantize(tiny_model("opt"), [ids], method=method, weight_bits=8, activation_bits=8, preset=preset, **groups)
    with torch.no_grad():
        assert made(ids).logits.isfinite().all()
