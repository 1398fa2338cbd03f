"""SmoothQuant: exact in floating point, the authors' factors, better than rounding with outliers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, OPTForCausalLM, PreTrainedModel

from model_families import logits
from sparq.errors import SparqError
from sparq.models.families import named_linears
from sparq.quantization import quantize
from sparq.quantization.observers import input_absmax, observe_inputs
from sparq.quantization.smoothquant import (
    fold_into_norms,
    model_smoothing_factors,
    smoothed_groups,
    smoothing_factors,
)

FAMILIES = ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"]
PRE_NORM = ["tiny_llama", "tiny_opt"]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (3, 20))


def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """Norms of random weight and bias, some channels 50 times larger, as in pretrained models."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            noise = torch.rand(parameter.shape, generator=generator) + 0.5
            noise[3::11] *= 50
            parameter.data.copy_(noise if name.endswith("weight") else noise - 1)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_float_model_unchanged(
    name: str, alpha: float, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    model = with_outliers(request.getfixturevalue(name))
    smoothed = quantize(model, [ids], method="smoothquant", weight_bits=16, activation_bits=16, smoothing_alpha=alpha)
    assert relative(logits(smoothed, ids), logits(model, ids)) <= 1e-5
    weights = dict(named_linears(smoothed))
    changed = [n for n, layer in named_linears(model) if not torch.equal(layer.weight, weights[n].weight)]
    assert len(changed) == sum(len(names) for _, names in smoothed_groups(model)), "it must have smoothed something"


@pytest.mark.parametrize("name", PRE_NORM)
def test_folding_alone_leaves_nothing_to_do_at_run_time(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    model = with_outliers(request.getfixturevalue(name))
    before = logits(model, ids)
    absmax = input_absmax(model, [ids], [names[0] for _, names in smoothed_groups(model)])
    factors = model_smoothing_factors(model, absmax, 0.5)
    assert fold_into_norms(model, factors) == set()
    for layer, factor in factors.items():
        model.get_submodule(layer).weight.data.mul_(factor)
    assert relative(logits(model, ids), before) <= 1e-5
    after = input_absmax(model, [ids], list(absmax))
    for layer in absmax:
        torch.testing.assert_close(after[layer] * factors[layer], absmax[layer], rtol=1e-4, atol=1e-6)


def test_a_norm_without_weights_is_smoothed_at_run_time(tiny_opt: OPTForCausalLM, ids: Tensor) -> None:
    config = tiny_opt.config
    config.layer_norm_elementwise_affine = False
    model = OPTForCausalLM(config).eval()
    smoothed = quantize(model, [ids], method="smoothquant", weight_bits=16, activation_bits=16)
    assert smoothed.get_submodule("model.decoder.layers.0.fc1").input_scale is not None
    assert relative(logits(smoothed, ids), logits(model, ids)) <= 1e-5


def test_post_norm_keeps_its_norms_and_divides_at_run_time(tiny_opt_post_norm: OPTForCausalLM, ids: Tensor) -> None:
    model = with_outliers(tiny_opt_post_norm)
    smoothed = quantize(model, [ids], method="smoothquant", weight_bits=8, activation_bits=8)
    scaled = {name for name, layer in named_linears(smoothed) if layer.input_scale is not None}
    assert scaled == {name for _, names in smoothed_groups(model) for name in names}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(smoothed.get_parameter(name), parameter)


def slow_inputs(model: PreTrainedModel, layer: str, ids: Tensor) -> Tensor:
    """The inputs of one layer, row by row, by replacing its forward."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    original = module.forward

    def spy(x: Tensor) -> Tensor:
        seen.append(x.detach().reshape(-1, x.shape[-1]))
        return original(x)

    module.forward = spy
    try:
        for row in ids:
            logits(model, row[None])
    finally:
        del module.forward
    return torch.cat(seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_factors_against_a_slow_reference(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    model, alpha = with_outliers(request.getfixturevalue(name)), 0.3
    absmax = input_absmax(model, [ids[:1], ids[1:]], [names[0] for _, names in smoothed_groups(model)])
    factors = model_smoothing_factors(model, absmax, alpha)
    blocks = "model.layers" if name == "tiny_llama" else "model.decoder.layers"
    mlp = ["mlp.gate_proj", "mlp.up_proj"] if name == "tiny_llama" else ["fc1"]
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert set(factors) == {f"{blocks}.{i}.{n}" for i in (0, 1) for n in attention + mlp}
    for index in (0, 1):
        for group in (attention, mlp):
            names = [f"{blocks}.{index}.{n}" for n in group]
            inputs = slow_inputs(model, names[-1], ids)
            for channel in range(0, 32, 5):
                x = max(abs(v) for v in inputs[:, channel].tolist())
                w = max(abs(v) for n in names for v in model.get_submodule(n).weight[:, channel].tolist())
                expected = x**alpha / w ** (1 - alpha)
                for n in names:
                    assert factors[n][channel].item() == pytest.approx(expected, rel=1e-4)


def test_factors_have_the_authors_floors() -> None:
    absmax = torch.tensor([0.0, 4.0, 1e-12])
    factors = smoothing_factors(absmax, [torch.tensor([[1.0, 0.0, 1.0]])], 0.5)
    assert factors.tolist() == pytest.approx([1e-5, 2 / 1e-5**0.5, 1e-5], rel=1e-5)


def test_smoothquant_beats_rounding_where_channels_have_outliers(tiny_opt: OPTForCausalLM, ids: Tensor) -> None:
    model = with_outliers(tiny_opt)
    for name, layer in named_linears(model):  # pretrained models: small weights on large channels
        if name.endswith(("q_proj", "k_proj", "v_proj", "fc1")):
            layer.weight.data[:, 3::11] /= 50
    calibration, test = ids, torch.randint(3, 96, (4, 20))
    reference = logits(model, test)
    for bits in (8, 4):
        settings = {"weight_bits": bits, "activation_bits": bits}
        rounded = relative(logits(quantize(model, method="rtn", **settings), test), reference)
        smoothed = relative(logits(quantize(model, [calibration], method="smoothquant", **settings), test), reference)
        assert smoothed < rounded / 2, (bits, smoothed, rounded)


def padded(ids: Tensor) -> dict[str, Tensor]:
    """The same rows with left padding of the loudest token, of a different length each."""
    rows, length = ids.shape
    wide = torch.full((rows, length + rows), 95)
    mask = torch.zeros_like(wide)
    for index in range(rows):
        start = index + 1
        wide[index, start : start + length] = ids[index]
        mask[index, start : start + length] = 1
    return {"input_ids": wide, "attention_mask": mask}


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_left_out(name: str, ids: Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    ids = ids.clamp(max=94)
    embeddings = model.get_input_embeddings().weight.data
    embeddings[95] = 1000 * torch.randn(embeddings.shape[1])
    layers = [layer for layer, _ in named_linears(model)]
    counts: list[int] = []
    seen = observe_inputs(model, [padded(ids)], layers[:1], lambda _, rows: counts.append(len(rows)))
    assert counts == [seen] == [ids.numel()]
    plain, masked = input_absmax(model, [ids], layers), input_absmax(model, [padded(ids)], layers)
    assert set(plain) == set(masked) == set(layers)
    # OPT's positions follow the mask; Llama's rotary positions are relative. So padding changes nothing.
    for layer in layers:
        torch.testing.assert_close(masked[layer], plain[layer], rtol=2e-4, atol=1e-6)


def test_observing_reads_once_and_leaves_no_trace(tiny_llama: LlamaForCausalLM, ids: Tensor) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()

    def once() -> Iterator[Tensor]:
        yield ids
        yield ids[:, :3]

    layers = [layer for layer, _ in named_linears(tiny_llama)]
    input_absmax(tiny_llama, once(), layers)
    assert tiny_llama.training
    assert not tiny_llama.model.layers[0].training
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())

    def broken() -> Iterator[Tensor]:
        yield ids
        raise RuntimeError("broken stream")

    with pytest.raises(RuntimeError, match="broken stream"):
        input_absmax(tiny_llama, broken(), layers)
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


BAD_BATCHES = [
    ([], "the calibration data has no tokens"),
    ([torch.zeros(0, 4, dtype=torch.long)], "no tokens"),
    ([{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}], "no tokens"),
    ([torch.tensor([[3, 96]])], "batch 0 has the token id 96, but the model's vocabulary has 96 tokens"),
    ([torch.tensor([[3, -1]])], "the token id -1"),
    (
        [torch.tensor([3, 4])],
        r"is torch.int64 \[2\]; it must be integer token ids of shape \[batch, length\]",
    ),
    ([torch.ones(1, 4)], r"is torch.float32 \[1, 4\]"),
    ([{"labels": torch.ones(1, 4)}], r"has no 'input_ids', only \['labels'\]"),
    ([torch.full((1, 513), 5)], "batch 0 has 513 tokens a row, but the model's context is 512"),
    (
        [{"input_ids": torch.full((1, 4), 5), "attention_mask": torch.ones(1, 3)}],
        r"a mask of shape \[1, 3\] for ids of shape \[1, 4\]",
    ),
    (None, "smoothquant needs calibration data"),
]


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES)
def test_bad_calibration_data_is_one_line(tiny_llama: LlamaForCausalLM, batches: object, message: str) -> None:
    with pytest.raises(SparqError, match=message) as caught:
        quantize(tiny_llama, batches, method="smoothquant", weight_bits=8, activation_bits=8)
    assert "\n" not in str(caught.value)


def test_a_broken_model_is_reported(tiny_llama: LlamaForCausalLM, ids: Tensor) -> None:
    tiny_llama.model.norm.weight.data.fill_(1)
    tiny_llama.model.embed_tokens.weight.data[5] = float("inf")
    ids[0, 0] = 5
    with pytest.raises(SparqError, match=r"inputs of model\.layers\.0\.self_attn\.q_proj are NaN or infinite"):
        quantize(tiny_llama, [ids], method="smoothquant", weight_bits=8, activation_bits=8)
