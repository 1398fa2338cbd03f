"""Whole models: quantize leaves its argument alone, generation works, and files give the same logits."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_families import tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.models.families import named_linears
from sparq.quantization import (
    QuantizationScheme,
    QuantizedLinear,
    load_quantized,
    quantize,
    save_quantized,
    scheme_of,
)

FAMILIES = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]
PRECISIONS = [("rtn", 8), ("rtn", 4), ("smoothquant", 8), ("smoothquant", 4)]
W8A8 = {"method": "rtn", "weight_bits": 8, "activation_bits": 8}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (2, 16))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("method", "bits"), PRECISIONS)
def test_quantize_leaves_the_model_as_it_was(
    name: str, method: str, bits: int, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    chosen = QuantizationScheme(method=method, weight_bits=bits, activation_bits=bits)
    quantized = quantize(model, [ids], chosen)

    assert model.training
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == frozen
    assert scheme_of(model) is None
    assert type(model) is type(quantized)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in quantized.state_dict().values()}, "storage is shared"

    assert scheme_of(quantized) == chosen
    assert not quantized.training
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert all(isinstance(layer, QuantizedLinear) for _, layer in named_linears(quantized))
    assert isinstance(quantized.get_output_embeddings(), nn.Linear)
    output = logits(quantized, ids)
    assert bool(output.isfinite().all())
    assert not torch.equal(output, logits(model.eval(), ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_are_close_and_four_bits_are_not(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    for _, layer in named_linears(model):
        layer.weight.data.mul_(5)  # at their initial size the blocks hardly change the stream
    reference = logits(model, ids)
    errors = {}
    for bits in (4, 8):
        output = logits(quantize(model, method="rtn", weight_bits=bits, activation_bits=bits), ids)
        errors[bits] = ((output - reference).norm() / reference.norm()).item()
    assert errors[8] < 0.05
    assert errors[4] > 4 * errors[8]


@pytest.mark.parametrize("name", FAMILIES)
def test_tied_embeddings_stay_tied(name: str, request: pytest.FixtureRequest) -> None:
    quantized = quantize(request.getfixturevalue(name), **W8A8)
    assert quantized.get_input_embeddings().weight is quantized.get_output_embeddings().weight


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_the_cache_equals_a_full_pass(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    quantized = quantize(request.getfixturevalue(name), **W8A8)
    with torch.no_grad():
        cached = quantized(ids[:, :9], use_cache=True)
        steps = [cached.logits]
        for position in range(9, 16):
            cached = quantized(ids[:, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
            steps.append(cached.logits)
    full = logits(quantized, ids)
    # Sums in another order can move a value across a rounding boundary: one step of 8 bits, not more.
    assert (torch.cat(steps, 1) - full).norm() < 0.01 * full.norm()
    out = quantized.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 21)


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT 0.21
def test_peft_models_are_refused_until_merged(tiny_llama: LlamaForCausalLM, ids: Tensor) -> None:
    wrapped = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(SparqError, match=r"merge them first, with model\.merge_and_unload\(\)"):
            quantize(model, **W8A8)
    merged = wrapped.merge_and_unload()
    assert logits(quantize(merged, **W8A8), ids).shape == (2, 16, 96)


def test_mistakes_in_the_arguments_are_one_line(tiny_llama: LlamaForCausalLM) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    scheme = QuantizationScheme(**W8A8)
    cases = [
        (lambda: quantize(gpt2, **W8A8), "model family 'gpt2' is not supported"),
        (lambda: quantize(quantize(tiny_llama, **W8A8), **W8A8), "already quantized"),
        (lambda: quantize(tiny_llama, None, scheme, group_size=8), "not both"),
        (lambda: quantize(tiny_llama), "'method' is missing"),
        (
            lambda: quantize(tiny_llama, **W8A8, group_size=32),
            r"group_size 32 does not divide the 48 input features of model\.layers\.0\.mlp\.down_proj",
        ),
    ]
    for call, message in cases:
        with pytest.raises(SparqError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SparqError, match=r"weights of model\.layers\.1\.mlp\.up_proj have a NaN"):
        quantize(tiny_llama, **W8A8)


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


@pytest.mark.parametrize("attention", ["vanilla", "softmax1", "learned_sink"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_quantized_model_can_be_converted(family: str, attention: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = {"method": "rtn", "weight_bits": 4, "activation_bits": 8}
    after = convert(quantize(model, **settings), attention)
    before = quantize(convert(model, attention), **settings)
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)
