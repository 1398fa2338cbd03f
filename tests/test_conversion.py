"""Conversion: generation, gradients, gates, files, mistakes; tests/test_parity.py has the values."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.models import convert, converted_layers, load_backbone, load_model
from sparq.models.families import attention_layers, family_of


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("name", ["vanilla", "softmax1", "max_shift", "gated"])
def test_generation_in_batches_and_with_beams(family: str, name: str) -> None:
    model = convert(tiny_model(family), name)
    prompts = [torch.randint(4, 96, (n,)).tolist() for n in (3, 7)]
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * 4 + prompts[0], prompts[1]])
    for beams in (1, 3):
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        alone = [
            model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), **how)[
                0, len(p) :
            ]
            for p in prompts
        ]
        together = model.generate(ids, attention_mask=(ids != pad).long(), **how)[:, 7:]
        assert together.tolist() == [row.tolist() for row in alone]


LONG = 300
"""More keys than SHORT, so that training runs fused."""


@pytest.mark.parametrize("name", ["vanilla", "softmax1", "max_shift", "learned_sink", "softmax1+gated_mlp", "clipped"])
@pytest.mark.parametrize("length", [12, LONG])
def test_gradient_checkpointing_changes_no_gradient(name: str, length: int) -> None:
    model = convert(tiny_model("llama"), name).train()
    ids = torch.randint(4, 96, (2, length))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # Renamed in transformers 5.2x; the old name warns.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_and_written_out_training_agree() -> None:
    for name in ("softmax1", "max_shift", "learned_sink"):
        model = convert(tiny_model("llama"), name)
        ids = torch.randint(4, 96, (2, LONG))
        gradients = []
        for recording in (False, True):
            for layer in converted_layers(model):
                layer.recording = recording
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_dropout_drops_probabilities_while_training_only() -> None:
    model = convert(tiny_model("llama"), "softmax1")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids = torch.randint(4, 96, (1, LONG))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["softmax1", "max_shift", "learned_sink", "softmax1+gated", "clipped"])
def test_compiled(name: str) -> None:
    model = convert(tiny_model("llama"), name)
    ids = torch.randint(4, 96, (2, 16))
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    output = compiled(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["gated", "gated_mlp", "gated_all_heads", "gated_elementwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_starts_as_nothing_and_scales_heads(family: str, form: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(4, 96, (1, 7))
    ours = convert(copy.deepcopy(model), form)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits)
    # Weights of a gate are fixed points without noise: give them values, and compare with the heads scaled by hand.
    for layer in converted_layers(ours):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    inputs, outputs = [], []
    last = {"opt": "out_proj", "gpt_neox": "dense"}.get(family_of(model).model_type, "o_proj")
    first = attention_layers(ours)[0]
    first.register_forward_pre_hook(
        lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    first.get_submodule(last).register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    with torch.no_grad():
        ours(ids)
        gated = outputs.pop()
        gate = converted_layers(ours)[0].gate
        assert gate is not None
        bias, weights = gate.bias.clone(), gate.weight.clone()
        gate.weight.zero_()
        gate.bias.fill_(torch.logit(torch.tensor(gate.gate.pi)))
        ours(ids)
        ungated = outputs.pop()
        x = inputs[0]
        heads, width = 4, gated.shape[-1] // 4
        parts = x.view(1, 7, weights.shape[0], -1)
        if gate.first is not None:
            parts = torch.stack(
                [(parts[..., h, :] @ gate.first[h] + gate.first_bias[h]).clamp(min=0) for h in range(heads)], dim=2
            )
        logits = torch.stack([parts[..., g, :] @ weights[g] + bias[g] for g in range(weights.shape[0])], dim=2)
        factor = torch.sigmoid(logits).reshape(1, 7, heads, -1) / 0.25
        expected = ungated.view(1, 7, heads, width) * factor
    torch.testing.assert_close(gated.view(1, 7, heads, width), expected)


def test_unsupported_family() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(
        SparqError, match="'gpt2' is not supported; supported: llama, opt, mistral, qwen2, qwen3, gpt_neox"
    ):
        convert(model, "softmax1")


def test_another_variant_needs_it_said() -> None:
    model = convert(tiny_model("llama"), "learned_sink")
    with pytest.raises(SparqError, match="adapted with attention 'learned_sink', not 'softmax1': load it as"):
        convert(model, "softmax1")
    assert convert(model, "learned_sink") is model
    ids = torch.randint(4, 96, (1, 7))
    fresh = convert(tiny_model("llama"), "softmax1+gated")
    again = convert(convert(model, "softmax1+gated", replace=True), "softmax1+gated")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, fresh(ids).logits)
    # The layers' hooks were replaced, not added to.
    assert all(len(layer._forward_pre_hooks) == 1 for layer in (b.self_attn for b in again.model.layers))


@pytest.mark.parametrize("name", ["vanilla", "softmax1", "learned_sink", "max_shift+gated_elementwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, name: str, tmp_path: Path) -> None:
    model = convert(tiny_model(family), name)
    for layer in converted_layers(model):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    ids = torch.randint(4, 96, (1, 7))
    again = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if name != "vanilla":
        with pytest.raises(SparqError, match="adapted with attention"):
            load_model(str(tmp_path), "vanilla")
        load_model(str(tmp_path), "vanilla", replace=True)


def test_a_missing_sink_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    convert(tiny_model("llama"), "learned_sink").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.self_attn.outlier_free.sink"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SparqError, match=f"'{gone}' is missing: .* has 2 tensors of its own, the checkpoint 1"):
        load_model(str(tmp_path))


def test_a_model_that_was_not_converted_says_so(tmp_path: Path) -> None:
    convert(tiny_model("llama"), "softmax1")
    plain = tiny_model("llama")
    plain.set_attn_implementation("sparq")
    with pytest.raises(SparqError, match="was not converted: load the model with sparq.load_model"):
        plain(torch.tensor([[5]]))


@pytest.mark.pretrained
def test_smollm2_through_this_code_equals_transformers(smollm2_folder: Path) -> None:
    ids = torch.arange(1000, 1040)[None]
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    ours = load_backbone(str(smollm2_folder), attention="vanilla")
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, theirs(ids).logits)
    assert ours.num_parameters == 134_515_008
