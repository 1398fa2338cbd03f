"""Converted models of every family against transformers' own eager code with the softmax replaced by the formula."""

import contextlib
import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache

from model_families import FAMILIES, tiny_model
from sparq.attention import AttentionSpec, Clip
from sparq.models import convert, converted_layers, recording_attention

SINK = 0.7
CLIP = Clip(alpha=0.2, eta=1.05, length=8)
SPECS = {
    **{n: AttentionSpec.parse(n) for n in ("vanilla", "softmax1", "max_shift", "learned_sink", "none", "l1", "mean")},
    "vanilla_max_shift": AttentionSpec.parse("vanilla_max_shift"),
    "clipped": AttentionSpec(clip=CLIP),
    "softmax1+clipped": AttentionSpec(normalization="softmax1", clip=CLIP),
}


def formula(scores: Tensor, name: str) -> Tensor:
    """Rows where transformers has written the lowest number of the type for what is masked."""
    seen = scores > torch.finfo(scores.dtype).min / 2
    s = scores.double()
    largest = torch.where(seen.any(dim=-1, keepdim=True), s.amax(dim=-1, keepdim=True), 0.0)
    if name in ("max_shift", "vanilla_max_shift"):
        s = s - largest
    if name == "mean":
        s = s - (s * seen).sum(dim=-1, keepdim=True) / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    if name == "l1":
        s = s / (s * seen).abs().sum(dim=-1, keepdim=True).clamp(min=1e-300)
    one = 0.0 if name in ("vanilla", "vanilla_max_shift", "clipped") else float(torch.tensor(SINK).exp())
    one = one if name in ("learned_sink", "vanilla", "vanilla_max_shift", "clipped") else 1.0
    e = torch.where(seen, s.exp(), 0.0)
    total = one + e.sum(dim=-1, keepdim=True)
    p = e / torch.where(total == 0, 1.0, total)  # a padding token on the left sees nothing
    if "clipped" in name:
        p = ((CLIP.eta - CLIP.gamma) * p + CLIP.gamma).clamp(0, 1)
    return p


@contextlib.contextmanager
def eager_with(model: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreTrainedModel]:
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("eager")

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        assert dim == -1
        return formula(scores, name).to(dtype or scores.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield theirs


def converted(model: PreTrainedModel, name: str) -> PreTrainedModel:
    ours = convert(copy.deepcopy(model), SPECS[name])
    for layer in converted_layers(ours):
        if layer.sink is not None:
            torch.nn.init.constant_(layer.sink, SINK)
    return ours


def run(model: PreTrainedModel, mask: str, cache: str) -> Tensor:
    """Logits of the real tokens of two sequences, in one pass or in pieces through a cache."""
    torch.manual_seed(1)
    ids = torch.randint(4, 96, (2, 11))
    attention_mask = torch.ones_like(ids)
    inputs = {}
    if mask == "left":
        attention_mask[0, :4] = 0
    if mask == "right":
        attention_mask[0, 8:] = 0
    if mask == "packed":  # two documents in each row; a new one starts where positions start anew
        inputs["position_ids"] = torch.tensor([[*range(5), *range(6)], [*range(3), *range(8)]])
    if mask in ("left", "right"):
        inputs["attention_mask"] = attention_mask
    with torch.no_grad():
        if cache == "none":
            logits = model(ids, **inputs, use_cache=False).logits
            return logits[attention_mask.bool()]
        pieces = []
        past = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
        for start, end in ((0, 7), (7, 8), (8, 11)):
            part = {"attention_mask": attention_mask[:, :end]} if "attention_mask" in inputs else {}
            if model.config.model_type != "opt":
                part["position_ids"] = torch.arange(start, end).expand(2, -1)
            out = model(ids[:, start:end], past_key_values=past, use_cache=True, **part)
            past = out.past_key_values
            pieces.append(out.logits)
        return torch.cat(pieces, dim=1)[attention_mask.bool()]


# Logits of these models are up to 30. Differences come from the order of sums; in 16 bit from probabilities that
# transformers rounds before the product and a flash kernel after it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


# Packed rows are for training, without a cache; OPT takes its positions from the mask, so it cannot be told of them.
MATRIX = [
    pytest.param(family, name, mask, cache, dtype, id=f"{family}-{name}-{mask}-{cache}-{str(dtype)[6:]}")
    for family, name, mask, cache, dtype in itertools.product(
        FAMILIES, SPECS, ("causal", "left", "right", "packed"), ("none", "dynamic", "static"), TOLERANCE
    )
    if mask != "packed" or (cache == "none" and not family.startswith("opt"))
]


@pytest.mark.parametrize(("family", "name", "mask", "cache", "dtype"), MATRIX)
def test_parity(
    family: str, name: str, mask: str, cache: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).to(dtype)
    with eager_with(model, name, monkeypatch) as theirs:
        expected = run(theirs, mask, cache)
    ours = run(converted(model, name), mask, cache)
    difference = (ours.float() - expected.float()).norm() / expected.float().norm()
    assert difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_vanilla_equals_transformers_own_to_the_last_bit(family: str) -> None:
    model = tiny_model(family)
    for mask, cache in itertools.product(("causal", "left"), ("none", "dynamic")):
        assert torch.equal(run(converted(model, "vanilla"), mask, cache), run(model, mask, cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_nothing(family: str) -> None:
    ids = torch.randint(4, 96, (1, 9))
    for name in ("softmax1", "max_shift", "mean"):
        model = converted(tiny_model(family), name)
        with torch.no_grad():
            torch.testing.assert_close(model(ids[:, :6]).logits, model(ids).logits[:, :6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vanilla", "softmax1", "max_shift"])
def test_probabilities_are_returned_when_asked_for(family: str, name: str) -> None:
    model = converted(tiny_model(family), name)
    ids = torch.randint(4, 96, (1, 6))
    with torch.no_grad():
        plain = model(ids)
        asked = model(ids, output_attentions=True)
        with recording_attention(model):
            recorded = model(ids, output_attentions=True)
    assert not plain.attentions or plain.attentions[0] is None
    for output in (asked, recorded):
        assert [tuple(p.shape) for p in output.attentions] == [(1, 4, 6, 6)] * 2
        torch.testing.assert_close(output.logits, plain.logits, atol=1e-4, rtol=1e-4)
    mass = asked.attentions[0].sum(dim=-1)
    assert torch.allclose(mass, torch.ones_like(mass)) == (name == "vanilla")
    if name == "max_shift":  # a row that sees one key
        torch.testing.assert_close(mass[..., 0], torch.full_like(mass[..., 0], 0.5))
