"""The norms of proposition C.1, against products written out."""

import math
from pathlib import Path

import pytest
import torch

import small_world
from model_families import tiny_model
from sparq.adaptation import LoraSettings, add_lora
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.papers.norm_condition import measure_norm_condition, query_updates

IDS = torch.arange(3, 24).reshape(3, 7)


@pytest.mark.parametrize(("family", "norm"), [("llama", "input_layernorm"), ("opt", "self_attn_layer_norm")])
def test_norms_are_those_of_the_projections_inputs(family: str, norm: str) -> None:
    model = tiny_model(family)
    layers = model.model.layers if family == "llama" else model.model.decoder.layers
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    updates = [torch.randn(layer.self_attn.q_proj.weight.shape) for layer in layers]
    found = measure_norm_condition(model, [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}], updates)
    for index, layer in enumerate(layers):
        with torch.no_grad():
            x = getattr(layer, norm)(hidden[index])
            keys, queries = (x @ layer.self_attn.k_proj.weight.T).abs().max(), (x @ updates[index].T).abs().max()
        assert found[index].key_norm == pytest.approx(float(keys), rel=1e-5)
        assert found[index].query_update_norm == pytest.approx(float(queries), rel=1e-5)
        assert found[index].key_ratio == pytest.approx(float(keys) / math.sqrt(math.log(7)), rel=1e-5)
        assert found[index].query_update_ratio == pytest.approx(float(queries) / math.sqrt(math.log(7)), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "opt_350m", "qwen3"])
def test_padding_counts_for_nothing(family: str) -> None:
    """A short sequence has its own L: its ratio is over the log of 3, not of the batch's 7."""
    model = tiny_model(family)
    alone = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:2, :3]}]
    padded = IDS[:2].clone()
    padded[1] = torch.cat([torch.full((4,), 5), IDS[1, :3]])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    expected = measure_norm_condition(model, alone)
    found = measure_norm_condition(model, [{"input_ids": padded, "attention_mask": mask}])
    for a, b in zip(expected, found, strict=True):
        assert (a.key_norm, a.key_ratio) == pytest.approx((b.key_norm, b.key_ratio), rel=1e-4)
        assert b.query_update_norm is None


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_what_merging_adds_to_the_queries(tmp_path: Path, rslora: bool) -> None:
    model = tiny_model("llama")
    before = [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]
    adapted = add_lora(model, LoraSettings(rank=4, alpha=12, dropout=0.0, rslora=rslora))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    updates = query_updates(tmp_path, tiny_model("llama"))
    assert updates is not None
    for old, layer, update in zip(before, adapted.merge_and_unload().model.layers, updates, strict=True):
        torch.testing.assert_close(layer.self_attn.q_proj.weight - old, update, atol=1e-4, rtol=1e-4)
    assert query_updates(tmp_path / "adapter", model) is None


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match="gpt_neox makes queries, keys and values in one layer"):
        measure_norm_condition(tiny_model("gpt_neox"), [{"input_ids": IDS}])
    with pytest.raises(SparqError, match="no sequences"):
        measure_norm_condition(tiny_model("llama"), [])
    with pytest.raises(SparqError, match="fewer than 2 tokens"):
        measure_norm_condition(tiny_model("llama"), [{"input_ids": IDS[:, :1]}])
    for settings, message in (
        (LoraSettings(rank=2, dora=True), "adapted with DoRA"),
        (LoraSettings(rank=2, targets=("v_proj",)), "no adapter on the queries of layer 0"),
    ):
        add_lora(tiny_model("llama"), settings).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        with pytest.raises(SparqError, match=message):
            query_updates(tmp_path, tiny_model("llama"))


def test_the_command_prints_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_world.make_backbone(tmp_path / "backbone", "opt")
    arguments = ["paper", "norms", str(folder), "--tokens", "200", "--context", "100", "--attention", "softmax1"]
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["0", "1"]
    assert main([*arguments, "--text", str(tmp_path / "nothing.txt")]) == 2
