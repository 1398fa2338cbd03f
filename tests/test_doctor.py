"""Each thing that the doctor finds, made on purpose, and a healthy model."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model_families import FAMILIES, tiny_model
from sparq.attention import SinkSchedule
from sparq.cli.main import main
from sparq.evaluation.doctor import Finding, examine
from sparq.models import convert, converted_layers

IDS = torch.randint(4, 96, (12,), generator=torch.Generator().manual_seed(5))


def found(findings: list[Finding], severity: str) -> str:
    return "\n".join(finding.what for finding in findings if finding.severity == severity)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vanilla", "softmax1", "max_shift", "clipped", "gated"])
def test_a_sound_model_has_no_fault(family: str, name: str) -> None:
    assert found(examine(convert(tiny_model(family), name), IDS), "fault") == ""
    assert found(examine(tiny_model(family), IDS), "fault") == ""


def test_a_conversion_that_transformers_lost(tmp_path: Path) -> None:
    convert(tiny_model("llama"), "softmax1").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "names the attention 'softmax1', but the layers run the pretrained softmax" in found(
        examine(model, IDS), "fault"
    )


def test_a_backend_without_sinks() -> None:
    model = convert(tiny_model("llama"), "softmax1")
    model.set_attn_implementation("sdpa")
    assert "the attention implementation is 'sdpa', which knows no sink" in found(examine(model, IDS), "fault")


def test_layers_of_two_kinds() -> None:
    model = convert(tiny_model("llama"), "softmax1")
    model.config.sparq_attention = "max_shift"
    assert "do not all have the attention" in found(examine(model, IDS), "fault")


def test_an_attention_without_a_mask() -> None:
    def forgetful(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        return sdpa_attention_forward(module, query, key, value, None, is_causal=False, **options)

    AttentionInterface.register("forgetful", forgetful)
    model = tiny_model("llama")
    model.set_attn_implementation("forgetful")
    faults = found(examine(model, IDS), "fault")
    assert "'forgetful' has no mask function" in faults
    assert "causality is lost" in faults
    assert "padding on the left changes the logits" in faults


def test_no_numbers() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    assert "are not finite" in found(examine(model, IDS), "fault")


def test_unshifted_scores() -> None:
    model = convert(tiny_model("llama"), "none")
    assert "exp overflows at 88.7" in found(examine(model, IDS), "warning")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(80)
    assert "they reach" in found(examine(model, IDS), "fault")


def test_embeddings_that_came_apart() -> None:
    model = tiny_model("llama")
    assert "are one tensor" in found(examine(model, IDS), "note")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert "ties embedding and head, but they are two tensors" in found(examine(model, IDS), "fault")


def test_outliers_and_float16() -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.bias[3] = 3e4
    warnings = found(examine(model, IDS), "warning")
    assert "and float16 ends at 65,504" in warnings
    assert "half of that token's elements round to 0" in warnings


def test_things_to_know() -> None:
    assert "norms stand after the sublayers" in found(examine(tiny_model("opt_350m"), IDS), "note")
    model = convert(tiny_model("llama"), "softmax1")
    SinkSchedule(model, updates=3).set(0)
    model.generation_config.cache_implementation = "quantized"
    notes = found(examine(model, IDS), "note")
    assert "a sink is at -inf" in notes
    assert "a quantized cache" in notes
    assert all(layer.log_weight is not None for layer in converted_layers(model))


@pytest.mark.pretrained
def test_the_command(smollm2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(smollm2_folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{smollm2_folder}: llama, vanilla\n")
    assert "warning: a layer's output reaches" in printed
    assert "note: embedding and head are one tensor" in printed
