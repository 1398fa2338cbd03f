"""Learned clipping and changes: exact in floating point, what is trained is what comes out, and it helps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.models.families import decoder_blocks, family_of
from sparq.quantization import QuantizationScheme, quantize
from sparq.quantization.block_stream import BlockStream
from sparq.quantization.equivalence import Change, Junction
from sparq.quantization.learned import _start, _train, junctions
from sparq.quantization.learned_block import LearnedBlock
from sparq.quantization.quantizer import fake_quantize
from sparq.quantization.straight_through import quantize_through


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(seed))


def scheme(method: str, **changes: Any) -> QuantizationScheme:
    return QuantizationScheme.from_dict({"method": method, "weight_bits": 4, "activation_bits": 16, **changes})


def prepared(family: str, chosen: QuantizationScheme) -> tuple[LearnedBlock, BlockStream, list[Tensor], nn.Module]:
    """The first block of a model, with its changes far from where they start."""
    model = convert(tiny_model(family), "vanilla")
    stream = BlockStream(model, [ids()])
    block = decoder_blocks(model)[0]
    changes = [_start(stream, 0, junction, chosen) for junction in junctions(model, block, chosen)]
    original = copy.deepcopy(block)
    with torch.no_grad():
        targets = [stream.call(0, 0).clone()]
    for change in changes:
        change.admitted.fill_(1.0)
        with torch.no_grad():
            change.log_scale.add_(0.2 * torch.randn_like(change.log_scale))
            if change.mix is not None:
                change.mix.add_(20 * torch.randn_like(change.mix) / change.mix.shape[-1])
    return LearnedBlock(block, family_of(model), chosen, changes), stream, targets, original


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_changes_leave_the_float_block_as_it_was(family: str, method: str) -> None:
    learned, stream, targets, _ = prepared(family, scheme(method, weight_bits=16))
    args, kwargs = stream.batches[0].calls[0]
    with torch.no_grad():
        out = learned(stream.batches[0].states, args, kwargs)
    assert (out - targets[0]).norm() <= 1e-5 * targets[0].norm()


@pytest.mark.parametrize(
    "inputs",
    [
        {"activation_bits": 16},
        {"activation_bits": 4},
        {"activation_bits": 4, "activation_granularity": "group"},
        {"activation_bits": 4, "activation_granularity": "tensor"},
    ],
    ids=lambda inputs: "-".join(map(str, inputs.values())),
)
@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_comes_out(family: str, method: str, inputs: dict[str, Any]) -> None:
    learned, stream, targets, _ = prepared(family, scheme(method, group_size=8, **inputs))
    args, kwargs = stream.batches[0].calls[0]
    with torch.no_grad():
        simulated = learned(stream.batches[0].states, args, kwargs)
        learned.finish()
        finished = stream.call(0, 0)
    # Two ways to compute one number may round to different integers, of a weight or of an activation.
    assert (finished - simulated).norm() <= 0.02 * (simulated - targets[0]).norm()


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("family", ["llama", "opt", "opt_350m"])
def test_training_lowers_the_loss(family: str, method: str) -> None:
    chosen = scheme(method, weight_bits=3, activation_bits=6, epochs=40)
    learned, stream, targets, original = prepared(family, chosen)
    before, after = _train(learned, stream, 0, targets, chosen)
    assert after < 0.9 * before
    left = dict(stream.blocks[0].named_parameters())
    for name, linear in learned._linears.items():
        left |= {f"{name}.{part}": parameter for part, parameter in linear.named_parameters()}
    assert left.keys() == dict(original.named_parameters()).keys()
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, left[name]), name


def test_a_loss_that_turns_nan_keeps_the_best_state() -> None:
    chosen = scheme("omniquant", weight_bits=3, epochs=3, change_rate=1.0, clipping_rate=1.0)
    learned, stream, targets, _ = prepared("llama", chosen)
    clean = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    calls = 0
    forward = learned.forward

    def broken(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*args) * (float("nan") if calls == 2 else 1.0)

    learned.forward = broken  # type: ignore[method-assign]
    before, after = _train(learned, stream, 0, targets, chosen)
    assert after == before
    for name, tensor in learned.state_dict().items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantization_with_a_gradient_has_the_values_of_that_without(bits: int, symmetric: bool) -> None:
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        quantize_through(x, bits, symmetric=symmetric), fake_quantize(x, bits, symmetric=symmetric)
    )
    clipped = quantize_through(x, bits, symmetric=symmetric, low_share=0.7, high_share=0.7)
    torch.testing.assert_close(clipped, fake_quantize(x, bits, symmetric=symmetric, clip=0.7))


def test_the_gradient_of_clipping_is_that_of_the_range() -> None:
    """Where a value is clipped it moves with the edge; elsewhere the step changes under a fixed integer."""
    x = torch.tensor([[10.0, 3.0, -2.0]])
    share = torch.tensor([[0.5]], requires_grad=True)
    out = quantize_through(x, 4, symmetric=True, high_share=share)
    step = 10.0 * 0.5 / 7
    integers = torch.tensor([7.0, round(3 / step), round(-2 / step)])
    torch.testing.assert_close(out.detach(), (integers * step)[None])
    out[0, 0].backward()
    assert share.grad is not None
    torch.testing.assert_close(share.grad, torch.tensor([[10.0]]))


def test_the_mask_lets_bands_in_gradually() -> None:
    junction = Junction(maker="norm", readers=("a",), width=8, whole=True)
    change = Change(junction, torch.full((8,), 2.0), torch.zeros(8), stability=0.01)
    with torch.no_grad():
        change.mix.fill_(1.0)  # type: ignore[union-attr]
    for admitted, band in ((0.0, 0), (0.25, 2), (1.0, 7)):
        change.admitted.fill_(admitted)
        matrix = change.matrix()[0].detach()
        index = torch.arange(8)
        distance = (index[:, None] - index).abs()
        expected = torch.where(distance == 0, 2.0, torch.where(distance <= band, 0.02, 0.0))
        torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("family", ["llama", "opt", "opt_350m", "gpt_neox"])
def test_whole_models_lose_less_than_by_rounding(family: str) -> None:
    model = convert(tiny_model(family), "softmax1")
    losses = {}
    with torch.no_grad():
        before = model(ids()).logits
    for method in ("rtn", "omniquant", "affinequant"):
        changed = quantize(model, [ids()], method=method, weight_bits=3, activation_bits=16, group_size=16, epochs=40)
        with torch.no_grad():
            losses[method] = float((changed(ids()).logits - before).square().mean())
    assert losses["omniquant"] < losses["rtn"]
    assert losses["affinequant"] < losses["rtn"]


def test_gptq_does_not_go_with_learned_clipping() -> None:
    with pytest.raises(SparqError, match="omniquant learns its clipping .* rounding cannot be 'gptq'"):
        scheme("omniquant", rounding="gptq")
    with pytest.raises(SparqError, match="affinequant learns how far .*: weight_range must be 'max', not 'mse'"):
        scheme("affinequant", weight_range="mse")
    with pytest.raises(SparqError, match="epochs is 0; it must be a whole number from 1 on"):
        scheme("omniquant", epochs=0)
