"""Whole models: quantize leaves its argument alone, and what it gives generates and can be converted."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from model_families import logits, tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.models.families import named_linears
from sparq.quantization import (
    QuantizationScheme,
    QuantizedLinear,
    quantize,
    scheme_of,
)

FAMILIES = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]
PRECISIONS = [("rtn", 8), ("rtn", 4), ("smoothquant", 8), ("smoothquant", 4)]
W8A8 = {"method": "rtn", "weight_bits": 8, "activation_bits": 8}


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
