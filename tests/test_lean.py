"""Norms and gated MLPs that keep less for the backward, against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import tiny_model
from sparq.training.lean import keep_less

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def saved_bytes(run: Any) -> int:
    """Return the bytes of all that autograd keeps of a call, shared storage counted once."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_computes_what_transformers_computes(family: str, dtype: torch.dtype) -> None:
    theirs = tiny_model(family).to(dtype).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    ours = copy.deepcopy(theirs)
    keep_less(ours)
    keep_less(ours)
    swapped = {type(m).__name__ for m in ours.modules()} - {type(m).__name__ for m in theirs.modules()}
    assert sorted(name[:4] for name in swapped) == ["Lean", "Lean"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids = torch.randint(theirs.config.vocab_size, (2, 17))
    outputs = [model(input_ids=ids).logits for model in (ours, theirs)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.float().square().mean().backward()
    tolerance = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        distance = (mine.grad - other.grad).norm() / other.grad.norm()
        assert distance <= tolerance, (name, float(distance))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_in_double_precision(frozen: bool) -> None:
    """Transformers' norm computes in float32, so float64 shows its rounding: larger steps than gradcheck's default."""
    model = tiny_model("llama").double()
    keep_less(model)
    block = model.model.layers[0]
    block.requires_grad_(not frozen)
    x = torch.randn(3, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block.mlp, (x,))
    assert torch.autograd.gradcheck(block.input_layernorm, (x,), eps=1e-3, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    keep_less(model)
    x = torch.randn(3, model.config.hidden_size, dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    (model.model.norm(x) + model.model.layers[0].mlp(x)).sum().backward()
    assert torch.equal(x, before)


def test_keeps_less() -> None:
    theirs = tiny_model("llama").bfloat16()
    ours = copy.deepcopy(theirs)
    keep_less(ours)
    tokens, hidden, width = 64, theirs.config.hidden_size, theirs.config.intermediate_size
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    mlps, norms = (
        [saved_bytes(lambda part=part: part(x)) for part in parts]
        for parts in zip(*((m.model.layers[0].mlp, m.model.norm) for m in (ours, theirs)), strict=True)
    )
    assert mlps[1] - mlps[0] == 2 * tokens * width
    # x in 16 bit, of which others keep nothing, in place of x and of x r in float32 and 16 bit.
    assert norms[0] < norms[1] - 2 * tokens * hidden


def test_other_modules_stay() -> None:
    model = tiny_model("opt")
    kinds = [type(m) for m in model.modules()]
    keep_less(model)
    assert [type(m) for m in model.modules()] == kinds
    llama = tiny_model("llama")
    llama.model.layers[0].mlp.act_fn = nn.GELU()
    keep_less(llama)
    assert type(llama.model.layers[0].mlp).__name__ == "LlamaMLP"
