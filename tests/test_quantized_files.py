"""Files of quantized models: they give the same logits, are small, and a damaged one is one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_families import logits
from sparq.errors import SparqError
from sparq.models import convert
from sparq.quantization import (
    QuantizationScheme,
    load_quantized,
    quantize,
    save_quantized,
    scheme_of,
)

FAMILIES = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]
W8A8 = {"method": "rtn", "weight_bits": 8, "activation_bits": 8}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "weight_bits": 8, "activation_bits": 8},
        {"method": "smoothquant", "weight_bits": 4, "activation_bits": 4},
        {
            "method": "smoothquant",
            "weight_bits": 3,
            "activation_bits": 6,
            "group_size": 16,
            "weight_symmetric": False,
        },
        {
            "method": "rtn",
            "weight_bits": 2,
            "activation_bits": 16,
            "group_size": 8,
            "activation_symmetric": False,
        },
        {"method": "rtn", "weight_bits": 16, "activation_bits": 8, "activation_granularity": "tensor"},
        {"method": "gptq", "weight_bits": 4, "activation_bits": 8},
        {"method": "rotation", "weight_bits": 4, "activation_bits": 4},
        {"method": "omniquant", "weight_bits": 4, "activation_bits": 4, "epochs": 1},
        # Behind a norm all readers share one matrix.
        {"method": "affinequant", "weight_bits": 4, "activation_bits": 16, "epochs": 1},
    ],
)
def test_save_and_load_give_the_same_logits_bit_for_bit(
    name: str, settings: dict[str, object], ids: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    model.generation_config.max_length = 77
    quantized = quantize(model, [ids], **settings)
    save_quantized(quantized, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert type(loaded) is type(quantized)
    assert torch.equal(logits(loaded, ids), logits(quantized, ids))
    assert scheme_of(loaded) == scheme_of(quantized) == QuantizationScheme.from_dict(settings)
    assert loaded.config.to_dict() == quantized.config.to_dict()
    assert loaded.generation_config.max_length == 77
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert not loaded.training
    assert {k: (v.dtype, v.shape) for k, v in loaded.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in quantized.state_dict().items()
    }
    save_quantized(loaded, tmp_path / "model")  # again, over the first
    assert torch.equal(logits(load_quantized(tmp_path / "model"), ids), logits(quantized, ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_bfloat16_models_keep_their_types(tiny_llama: LlamaForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    quantized = quantize(tiny_llama.to(torch.bfloat16), [ids], method="smoothquant", weight_bits=8, activation_bits=8)
    save_quantized(quantized, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    output = logits(loaded, ids)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, logits(quantized, ids))
    types = {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()}
    assert types == {torch.int8, torch.float32, torch.bfloat16}


def test_weights_that_were_untied_stay_untied(tiny_llama: LlamaForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    tiny_llama.lm_head.weight = nn.Parameter(torch.randn_like(tiny_llama.lm_head.weight))
    quantized = quantize(tiny_llama, **W8A8)
    save_quantized(quantized, tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model"), ids), logits(quantized, ids))


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.55), (4, 0.30), (2, 0.17)])
def test_the_file_is_small(bits: int, limit: float, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    save_quantized(quantize(model, method="rtn", weight_bits=bits, activation_bits=8), tmp_path / "model")
    sixteen = sum(parameter.numel() for parameter in model.parameters()) * 2
    assert (tmp_path / "model" / "model.safetensors").stat().st_size <= limit * sixteen


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("variant", ["softmax1", "max_shift"])
def test_attention_variants_survive_quantization_and_storage(
    name: str, variant: str, ids: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = convert(request.getfixturevalue(name), variant)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    quantized = quantize(model, [batch], method="smoothquant", weight_bits=8, activation_bits=8)
    assert quantized.config.sparq_attention == variant
    save_quantized(quantized, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert loaded.config._attn_implementation == model.config._attn_implementation
    assert loaded.config.sparq_attention == variant
    whole = logits(loaded, ids)
    assert torch.equal(whole, logits(quantized, ids))
    prefix = logits(loaded, ids[:, :8])  # it is still causal
    assert (whole[:, :8] - prefix).norm() < 0.01 * prefix.norm()


def doubled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, None]:
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    return output * 2, None


def test_models_with_an_attention_of_their_own_need_build(
    tiny_llama: LlamaForCausalLM, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sparq_test_doubled"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, doubled_attention)
    plain = logits(tiny_llama, ids)
    tiny_llama.config._attn_implementation = name
    tiny_llama.config.sparq_attention = {"kind": "doubled"}
    quantized = quantize(tiny_llama, **W8A8)
    reference = logits(quantized, ids)
    assert not torch.allclose(reference, plain)
    save_quantized(quantized, tmp_path / "model")
    monkeypatch.undo()

    with pytest.raises(SparqError, match=r"has the attention 'sparq_test_doubled', which is not registered"):
        load_quantized(tmp_path / "model")

    def build(config: PretrainedConfig) -> PreTrainedModel:
        assert config.sparq_attention == {"kind": "doubled"}
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, doubled_attention)
        return AutoModelForCausalLM.from_config(config)

    loaded = load_quantized(tmp_path / "model", build)
    assert torch.equal(logits(loaded, ids), reference)
    assert loaded.config.sparq_attention == {"kind": "doubled"}

    def wrong(config: PretrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    with pytest.raises(SparqError, match="but `build` made one with 'eager'"):
        load_quantized(tmp_path / "model", wrong)


def test_damaged_or_foreign_folders_are_one_line(tiny_opt: OPTForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(SparqError, match="is not quantized: call quantize first"):
        save_quantized(tiny_opt, folder)
    with pytest.raises(SparqError, match="no such file"):
        load_quantized(folder)
    save_quantized(quantize(tiny_opt, method="rtn", weight_bits=4, activation_bits=8), folder)
    weights, description = folder / "model.safetensors", folder / "quantization.json"
    whole, text = weights.read_bytes(), description.read_text()

    def fails(message: str) -> None:
        with pytest.raises(SparqError, match=message) as caught:
            load_quantized(folder)
        assert "\n" not in str(caught.value)

    weights.write_bytes(whole[:-100])
    fails("cannot read .*model.safetensors")
    weights.unlink()
    fails("cannot read .*model.safetensors")
    weights.write_bytes(whole)
    tensors = load_file(weights)

    save_file({k: v for k, v in tensors.items() if k != "model.decoder.layers.0.fc1.weight_packed"}, weights)
    fails(r"does not fit model\.decoder\.layers\.0\.fc1: weight has shape None, not \[64, 32\]")
    save_file({k: v for k, v in tensors.items() if k != "model.decoder.embed_positions.weight"}, weights)
    fails(r"does not fit the model: .*Missing key.*embed_positions")
    save_file({k: v for k, v in tensors.items() if k != "model.decoder.layers.1.fc2.weight_scale"}, weights)
    fails(r"does not fit model\.decoder\.layers\.1\.fc2: weight_scale has shape None, not \[32, 1\]")
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    fails(r"does not fit the model: .*Unexpected key.*extra")
    weights.write_bytes(whole)

    for changes, message in [
        ({"format": "other"}, "does not describe a quantized model"),
        ({"version": 99}, "has format version 99; this sparq reads 2"),
    ]:
        description.write_text(json.dumps({**json.loads(text), **changes}))
        fails(message)
    description.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "aliases"}))
    fails("lacks aliases: it is damaged")

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("kept")
    with pytest.raises(SparqError, match="holds something else than a quantized model"):
        save_quantized(quantize(tiny_opt, **W8A8), other)
    assert (other / "precious.txt").read_text() == "kept"
