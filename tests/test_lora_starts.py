"""What an adaptation starts from, and mistakes in its settings."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptation_data import BASES, CASES, data, outlier_free, relative
from model_families import tiny_model
from sparq.adaptation import (
    LoraSettings,
    add_lora,
    trainable_parameters,
)
from sparq.adaptation.initialization import adapted_layers
from sparq.adaptation.loftq import loftq, truncated_svd
from sparq.adaptation.quantized_base import frozen, round_base
from sparq.adaptation.settings import Base
from sparq.data import IGNORE, Batch
from sparq.errors import SparqError
from sparq.models.families import named_linears


@pytest.mark.parametrize(("family", "changes"), [*CASES, ("gpt_neox", {"base": "nf4"}), ("opt", {"base": "int8"})])
def test_training_starts_from_the_base(family: str, changes: dict[str, Any]) -> None:
    """At first an adapted model is what its base is, but for LoftQ's, which is nearer to the float model."""
    settings = LoraSettings(rank=4, alpha=6, dropout=0.0, **changes)
    base = settings.base
    batch = data(1)[0].input_ids
    rounded, reference = outlier_free(family), outlier_free(family)
    if base is not None:
        round_base(rounded, base, {})
    adapted = add_lora(outlier_free(family), settings, batches=data())
    with torch.no_grad():
        expected, original = rounded(batch).logits, reference(batch).logits
        logits = adapted.eval()(input_ids=batch).logits
    if settings.initialization == "loftq":
        for name, layer in adapted_layers(adapted):
            weight = reference.get_submodule(name).weight
            left = layer.get_base_layer().dequantized() + layer.get_delta_weight("default") - weight
            assert left.norm() < 0.95 * (frozen(weight, base).dequantized() - weight).norm(), name
        assert relative(logits, original) < relative(expected, original)
    else:
        assert relative(logits, expected) < 1e-5
    adapted.train()(input_ids=batch).logits.square().mean().backward()
    parameters = trainable_parameters(adapted)
    assert all(parameter.grad is not None for parameter in parameters.values())
    # Kaiming's and EVA's A get no gradient before B has moved.
    assert all(parameters[name].grad.any() for name in parameters if "lora_B" in name or "embed" in name)
    assert sum("magnitude" in name for name in parameters) == (
        len(list(adapted_layers(adapted))) if settings.dora else 0
    )


@pytest.mark.parametrize("base", BASES)
def test_one_round_of_loftq_is_a_truncated_svd(base: Base) -> None:
    weight = torch.randn(48, 64)
    start = loftq(weight, rank=8, base=base, iterations=1)
    assert start.removed is None
    error = weight - frozen(weight, base).dequantized()
    tail = torch.linalg.svdvals(error.double())[8:].norm()
    assert float((error - start.added.product).norm()) == pytest.approx(float(tail), rel=1e-4)
    more = loftq(weight, rank=8, base=base, iterations=5)
    assert more.removed is not None
    left = weight - frozen(weight - more.removed.product, base).dequantized() - more.added.product
    assert left.norm() <= tail * 1.001


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)])
def test_truncated_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    part = truncated_svd(matrix, 6)
    assert relative(part.product.double(), left[:, :6] * singular[:6] @ right[:6]) < 1e-5
    torch.testing.assert_close(part.a.norm(dim=1), part.b.norm(dim=0))
    assert not truncated_svd(torch.zeros(shape), 6).product.any()


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_and_olora_against_their_definitions(rslora: bool) -> None:
    scaling = 6 / 2 if rslora else 6 / 4
    for start in ("pissa", "olora"):
        model = outlier_free("llama")
        weights = {name: linear.get_parameter("weight").detach().double() for name, linear in named_linears(model)}
        settings = LoraSettings(rank=4, alpha=6, dropout=0.0, initialization=start, rslora=rslora)
        assert settings.scaling == scaling
        adapted = add_lora(model, settings)
        for name, layer in adapted_layers(adapted):
            update = layer.get_delta_weight("default").detach().double()
            if start == "pissa":
                left, singular, right = torch.linalg.svd(weights[name])
                expected = left[:, :4] * singular[:4] @ right[:4]
            else:
                q, r = torch.linalg.qr(weights[name])
                expected = scaling * q[:, :4] @ r[:4]
            assert relative(update, expected) < 1e-5
            assert relative(layer.get_base_layer().weight.detach().double() + update, weights[name]) < 1e-5


def test_eva_spans_what_the_inputs_vary_in() -> None:
    model, batches = outlier_free("opt_350m"), data(4)
    inputs: dict[str, list[Tensor]] = {name: [] for name, _ in named_linears(model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
        for name, layer in named_linears(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch.input_ids)
    for handle in handles:
        handle.remove()
    # The last batch of an epoch, with fewer target tokens than the rank.
    small = Batch(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[IGNORE, 6]]), num_targets=1, lengths=(2,))
    counted = torch.cat([(batch.labels != IGNORE).flatten() for batch in batches])
    adapted = add_lora(model, LoraSettings(rank=4, initialization="eva"), batches=[*batches, small])
    for name, layer in adapted_layers(adapted):
        seen = torch.cat(inputs[name])[counted]
        seen = seen - seen.mean(0)
        basis = layer.lora_A["default"].weight
        torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-3, rtol=0)
        best = torch.linalg.svdvals(seen)[:4].square().sum()
        # PEFT's sums are incremental and its SVD is random: near the best that four directions can do.
        assert (seen @ basis.T).square().sum() > 0.97 * best, name


def test_starting_twice_gives_the_same_base() -> None:
    """A run that goes on makes its base again; only what is trained is in its checkpoint."""
    for base, start in ((None, "pissa"), (None, "olora"), ("nf4-double", "loftq"), ("int8", "loftq")):
        settings = LoraSettings(rank=4, base=base, initialization=start)
        first, second = (dict(add_lora(outlier_free("llama"), settings).state_dict()) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_mistakes() -> None:
    model = tiny_model("llama")

    def settings(**changes: object) -> LoraSettings:
        return LoraSettings(rank=2, **changes)  # type: ignore[arg-type]

    for changes, message in (
        ({"dropout": 1.0}, "LoRA dropout is 1.0: expected at least 0 and less than 1"),
        ({"alpha": 0}, "LoRA alpha is 0: expected at least 1"),
        ({"initialization": "pisa"}, "LoRA initialization is 'pisa': did you mean 'pissa'"),
        ({"base": "nf5"}, "LoRA base is 'nf5': did you mean 'nf4'"),
        ({"initialization": "loftq"}, "'loftq' makes up for a quantized base: expected a base, int8 or nf4"),
        ({"initialization": "olora", "base": "int8"}, "'olora' is for a base in floating point, not 'int8'"),
        ({"initialization": "eva"}, "needs training batches of as many target tokens as the rank, 2; the largest of 0"),
    ):
        with pytest.raises(SparqError, match=message):
            add_lora(model, settings(**changes))
    short = Batch(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[IGNORE, 6]]), num_targets=1, lengths=(2,))
    with pytest.raises(SparqError, match="as the rank, 2; the largest of 1 has 1: give larger ones, or lower the rank"):
        add_lora(tiny_model("llama"), settings(initialization="eva"), batches=[short])
    for changes in ({"base": "nf4"}, {"initialization": "pissa"}):
        with pytest.raises(
            SparqError, match="need a model in float32, not torch.bfloat16: load it so, and give `dtype`"
        ):
            add_lora(tiny_model("llama").bfloat16(), settings(**changes))
