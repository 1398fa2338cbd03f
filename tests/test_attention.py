"""Converted models against the formula written out, under masks, caches and both families."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparq.errors import SparqError
from sparq.models import ATTENTION_VARIANTS, load_backbone, recording_attention, set_attention
from sparq.models.attention import reference_attention

FAMILIES = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def converted(model: PreTrainedModel, variant: str) -> PreTrainedModel:
    return set_attention(copy.deepcopy(model), variant)


def slow_attention(query, key, value, allowed, variant, scaling):  # type: ignore[no-untyped-def]
    """Loops over batch, head and query; no broadcasting, no shift, float64."""
    batch, heads, queries, _ = query.shape
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            for q in range(queries):
                seen = [k for k in range(key.shape[2]) if allowed[b, 0, q, k]]
                s = [float(query[b, h, q] @ key[b, kv, k]) * scaling for k in seen]
                shift = max(s) if s and variant == "max_shift" else 0.0
                total = sum(math.exp(x - shift) for x in s) + (variant != "vanilla")
                for x, k in zip(s, seen, strict=True):
                    out[b, h, q] += math.exp(x - shift) / total * value[b, kv, k]
    return out.transpose(1, 2)


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_reference_attention_with_grouped_queries_and_a_mask(variant: str) -> None:
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 3, dtype=torch.float64)
    allowed = torch.rand(2, 1, 5, 7) < 0.6
    allowed[0, 0, 3] = False
    ours, probabilities = reference_attention(query, key, value, allowed, variant=variant, scaling=0.4)
    # Between the two products the normalization runs in float32.
    torch.testing.assert_close(ours, slow_attention(query, key, value, allowed, variant, 0.4), atol=1e-6, rtol=1e-5)
    assert (probabilities[0, :, 3] == 0).all()


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_vanilla_equals_transformers_own(model: PreTrainedModel) -> None:
    ids = torch.randint(4, 96, (2, 11))
    with torch.no_grad():
        assert torch.equal(converted(model, "vanilla")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_causality_and_padding(model: PreTrainedModel, variant: str) -> None:
    """What is masked out changes nothing: a later token, or padding on either side."""
    model = converted(model, variant)
    ids = torch.randint(4, 96, (1, 9))
    with torch.no_grad():
        plain = model(ids).logits
        torch.testing.assert_close(model(ids[:, :6]).logits, plain[:, :6], atol=1e-5, rtol=1e-5)
        for side in ("left", "right"):
            padding = torch.full((1, 4), 3)
            parts = [padding, ids] if side == "left" else [ids, padding]
            mask = torch.cat([torch.full_like(p, int(p is ids)) for p in parts], dim=1)
            padded = model(torch.cat(parts, dim=1), attention_mask=mask).logits[mask.bool()]
            # OPT counts positions by the mask; left padding shifts Llama's rotations, which are relative.
            torch.testing.assert_close(padded, plain[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_cached_decoding_equals_one_pass(model: PreTrainedModel, variant: str) -> None:
    model = converted(model, variant)
    ids = torch.randint(4, 96, (2, 8))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        cache, pieces = first.past_key_values, [first.logits]
        for i in range(5, 8):
            step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_batched_generation_equals_one_by_one(tiny_llama: PreTrainedModel, variant: str) -> None:
    model = converted(tiny_llama, variant)
    prompts = [torch.randint(4, 96, (n,)).tolist() for n in (3, 7)]
    alone = [
        model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=5, do_sample=False)
        for p in prompts
    ]
    ids = torch.tensor([[0] * 4 + prompts[0], prompts[1]])
    together = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=5, do_sample=False)
    for row, single in zip(together, alone, strict=True):
        assert row[7:].tolist() == single[0, -5:].tolist()


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_variants_differ_and_report_their_probabilities(model: PreTrainedModel) -> None:
    ids = torch.randint(4, 96, (1, 6))
    mass = {}
    with torch.no_grad():
        for variant in ATTENTION_VARIANTS:
            variant_model = converted(model, variant)
            with recording_attention(variant_model):
                output = variant_model(ids, output_attentions=True)
            assert len(output.attentions) == 2
            mass[variant] = output.attentions[0].sum(dim=-1)
    torch.testing.assert_close(mass["vanilla"], torch.ones_like(mass["vanilla"]))
    # A row that sees one key: exp(s) / (1 + exp(s)), and one half.
    assert (mass["softmax1"][..., 0] < 1).all()
    torch.testing.assert_close(mass["max_shift"][..., 0], torch.full_like(mass["max_shift"][..., 0], 0.5))


def test_a_saved_variant_is_not_changed_silently(tiny_llama: PreTrainedModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    set_attention(tiny_llama, "softmax1").save_pretrained(tmp_path)
    with pytest.raises(SparqError, match="adapted with attention 'softmax1', not 'vanilla'"):
        load_backbone(str(tmp_path), attention="vanilla")
    assert load_backbone(str(tmp_path), attention="softmax1").num_tensors == 20


def test_unsupported_family() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(SparqError, match="'gpt2' is not supported; supported: llama, opt"):
        set_attention(model, "softmax1")


def test_a_checkpoint_with_a_missing_tensor_is_refused(tiny_opt: PreTrainedModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    tiny_opt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    removed = next(name for name in tensors if "fc1.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != removed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SparqError, match="1 missing tensors, the first .*fc1.weight"):
        load_backbone(str(tmp_path))


def test_a_checkpoint_with_an_unused_tensor_is_refused(tiny_opt: PreTrainedModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    tiny_opt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.decoder.layers.7.fc1.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(SparqError, match="1 unexpected tensors"):
        load_backbone(str(tmp_path))


def test_nothing_to_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SparqError, match="cannot load a causal LM from"):
        load_backbone(str(tmp_path))


@pytest.mark.pretrained
def test_smollm2_through_this_code_equals_transformers(smollm2_folder) -> None:  # type: ignore[no-untyped-def]
    ids = torch.arange(1000, 1040)[None]
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    ours = load_backbone(str(smollm2_folder), attention="vanilla")
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, theirs(ids).logits)
    assert ours.num_parameters == 134_515_008
