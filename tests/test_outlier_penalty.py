"""Kurtosis and max norm in the loss: exact gradients, padding, packing, accumulation, and fewer outliers."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import kurtosis
from torch import Tensor
from transformers import PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.adaptation import trainable_parameters
from sparq.data import Batch, collate, pack
from sparq.models import convert
from sparq.models.families import decoder_blocks
from sparq.tokens import Example
from sparq.training import LanguageModelLoss, TrainingRun
from sparq.training.outlier_penalty import OutlierPenalty, token_kurtosis, token_max_norm
from test_training import SETTINGS, fresh, full, run, stream

WEIGHTS = {"kurtosis": 0.3, "max_norm": 0.2}


def examples() -> list[Example]:
    rows = [torch.randint(5, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 9, 6)]
    return [Example(task="asr", prompt=tuple(row[:2]), target=tuple(row[2:])) for row in rows]


def penalty_by_hand(model: PreTrainedModel, batch: list[Example], weights: dict[str, float]) -> float:
    """Each sequence alone, by what the blocks' hooks see, in scipy."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in decoder_blocks(model)]
    total = 0.0
    for example in batch:
        outputs.clear()
        with torch.no_grad():
            model(torch.tensor([[*example.prompt, *example.target]]))
        for out in outputs:
            rows = (out[0] if isinstance(out, tuple) else out)[0].double().numpy()
            parts = weights["kurtosis"] * kurtosis(rows, axis=-1, fisher=False).sum()
            total += (parts + weights["max_norm"] * abs(rows).max(axis=-1).sum()) / len(outputs)
    for hook in hooks:
        hook.remove()
    return float(total)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_gradients_are_exact(scale: float) -> None:
    torch.manual_seed(0)
    hidden = scale * (torch.randn(5, 7, dtype=torch.float64) + 0.5)
    hidden[0, 3] = 30 * scale  # an outlier
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(token_kurtosis, hidden, eps=1e-6 * scale, atol=1e-6 / scale)
    assert torch.autograd.gradcheck(token_max_norm, hidden, eps=1e-6 * scale, atol=1e-6)
    expected = kurtosis(hidden.detach().numpy(), axis=-1, fisher=False)
    torch.testing.assert_close(token_kurtosis(hidden).detach(), torch.from_numpy(expected))
    assert torch.equal(token_max_norm(hidden).detach(), hidden.detach().abs().amax(-1))


def test_bfloat16_is_widened() -> None:
    hidden = torch.randn(6, 64).bfloat16()
    torch.testing.assert_close(token_kurtosis(hidden), token_kurtosis(hidden.double()).float())
    seen = hidden.clone().requires_grad_()
    token_kurtosis(seen).sum().backward()
    wide = hidden.double().requires_grad_()
    token_kurtosis(wide).sum().backward()
    assert seen.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(seen.grad.float(), wide.grad.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [pack, lambda rows: collate(rows, pad_id=0)], ids=["packed", "padded"])
def test_it_is_that_of_each_sequence_alone(family: str, make: Callable[[list[Example]], Batch]) -> None:
    model = convert(tiny_model(family), "softmax1")
    loss = LanguageModelLoss(model, OutlierPenalty(model, **WEIGHTS)).train()
    model.eval()  # families differ in dropout
    seen = loss(make(examples()))
    assert seen.penalty is not None
    assert float(seen.penalty) == pytest.approx(penalty_by_hand(model, examples(), WEIGHTS), rel=1e-4)
    plain = LanguageModelLoss(model)(make(examples()))
    assert float((seen.objective - plain.objective).detach()) == pytest.approx(float(seen.penalty), rel=1e-4)
    assert loss.eval()(make(examples())).penalty is None


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Through the whole model; what the penalty adds to the gradient, because the cross-entropy is in float32."""
    # OPT's norms stay in float64; Llama's are always in float32.
    model = convert(tiny_model("opt"), "softmax1").double()
    plain, loss = (LanguageModelLoss(model, penalty).train() for penalty in (None, OutlierPenalty(model, **WEIGHTS)))
    model.eval()
    batch = pack(examples())
    weight = model.get_parameter("model.decoder.layers.0.fc2.weight")
    (without,), (together,) = (torch.autograd.grad(own(batch).objective, [weight]) for own in (plain, loss))

    def penalty() -> float:
        seen = loss(batch).penalty
        assert seen is not None
        return float(seen)

    for place in ((0, 0), (5, 7), (9, 3)):
        with torch.no_grad():
            weight[place] += 1e-6
            above = penalty()
            weight[place] -= 2e-6
            below = penalty()
            weight[place] += 1e-6
        assert float((together - without)[place]) == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-5)


def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, updates=3, kurtosis_weight=0.3, max_norm_weight=0.2)

    def single(skip: int = 0):  # type: ignore[no-untyped-def]
        for batch in itertools.islice(stream(), skip // 4, None):
            for row, length in enumerate(batch.lengths):
                ids, labels = batch.input_ids[row : row + 1, :length], batch.labels[row : row + 1, :length]
                targets = int((labels != -100).sum())
                yield Batch(input_ids=ids, labels=labels, num_targets=targets, lengths=(length,))

    whole = run(fresh(), tmp_path / "whole", settings)
    cut = dataclasses.replace(settings, accumulate=4 * settings.accumulate)
    parts = TrainingRun(fresh(), tmp_path / "parts", settings=cut, key="key", batches=single, validation={})
    for training in (whole, parts):
        training.train("test")
    for mine, other in zip(whole.log, parts.log, strict=True):
        assert mine.penalty == pytest.approx(other.penalty, rel=1e-4)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)


def test_outliers_shrink(tmp_path: Path) -> None:
    """Trained with the penalty, a model has smaller norms and kurtosis than without."""
    found = {}
    for name, weight in (("without", 0.0), ("with", 0.5)):
        settings = dataclasses.replace(SETTINGS, updates=30, kurtosis_weight=weight, max_norm_weight=weight)
        training = run(full(), tmp_path / name, settings)
        training.train("test")
        model = training.model
        assert trainable_parameters(model)
        found[name] = [penalty_by_hand(model, examples(), {**dict.fromkeys(WEIGHTS, 0.0), key: 1.0}) for key in WEIGHTS]
        assert all((update.penalty is None) == (weight == 0) for update in training.log)
    assert found["with"][0] < 0.9 * found["without"][0]
    assert found["with"][1] < 0.9 * found["without"][1]
    assert all(not block._forward_hooks for block in decoder_blocks(run(full(), tmp_path / "off").model))
