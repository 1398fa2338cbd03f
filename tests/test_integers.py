"""Computing with integers: the accumulators of the simulation bit for bit, kernels against slow ones, refusals."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import sparq
from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.quantization import QuantizationScheme, QuantizedLinear, quantize, save_quantized, to_integers
from sparq.quantization.integer_linear import IntegerLinear
from sparq.quantization.integers import runs_on_integers
from sparq.quantization.weight_only import FEW_TOKENS, WeightOnly4, WeightOnly8

W8A8 = {"method": "rtn", "weight_bits": 8, "activation_bits": 8}


def layer_of(linear: nn.Linear, **changes: object) -> QuantizedLinear:
    return QuantizedLinear.round_to_nearest(linear, QuantizationScheme.from_dict({**W8A8, **changes}))


@given(
    st.integers(2, 8), st.integers(2, 8), st.sampled_from([None, 16, 32]), st.booleans(), st.booleans(),
    st.sampled_from(["token", "tensor", "group"]), st.booleans(), st.sampled_from([1, 40]),
)  # fmt: skip
def test_accumulators_are_the_simulated_ones_bit_for_bit(
    weight_bits: int, activation_bits: int, group_size: int | None, weight_symmetric: bool, activation_symmetric: bool,
    granularity: str, bias: bool, tokens: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(weight_bits * 8 + activation_bits)
    chosen = QuantizationScheme(
        method="rtn", weight_bits=weight_bits, activation_bits=activation_bits, group_size=group_size,
        weight_symmetric=weight_symmetric, activation_symmetric=activation_symmetric,
        activation_granularity=granularity if group_size else granularity.replace("group", "token"),
    )  # fmt: skip
    factor = torch.rand(96, generator=generator) + 0.5
    layers = [
        QuantizedLinear.round_to_nearest(nn.Linear(96, outputs, bias=bias), chosen, factor=factor, divide_input=True)
        for outputs in (24, 8)
    ]
    integer = IntegerLinear(layers, halves=weight_bits <= 4)
    x = torch.randn(2, tokens, 96, generator=generator) * 3 + 0.5
    accumulators = integer.accumulators(x)
    assert accumulators.dtype == torch.int32
    simulated = torch.cat([layer.accumulators(x) for layer in layers], 1)  # [tokens, outputs, groups]
    assert torch.equal(accumulators, simulated.permute(2, 0, 1))
    exact = torch.cat([layer.integer_forward(x) for layer in layers], -1)
    output = integer(x)
    assert output.shape == (2, tokens, 32)
    assert (output - exact).abs().max() <= 1e-6 * exact.abs().max()
    for kind in (torch.bfloat16, torch.float16):
        assert integer(x.to(kind)).dtype == kind


def as_integers_would(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What an exact accumulator becomes, with the float32 operations of `IntegerLinear`; slow."""
    assert layer.weight_scale is not None
    scaled = layer.accumulators(x).permute(2, 0, 1) * layer.weight_scale.t().unsqueeze(1)
    scale = layer.input_integers(x)[1]
    scale = scale.reshape(-1, scale.shape[-1])  # [tokens or 1, groups or 1]
    if scale.shape[1] > 1:
        output = (scaled * scale.t().unsqueeze(-1)).sum(0)
    else:
        output = (scaled[0] if len(scaled) == 1 else scaled.sum(0)) * scale
    output = output if layer.bias is None else output + layer.bias.float()
    return output.to(x.dtype).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "smoothquant", "dtype": torch.bfloat16},
        {"weight_bits": 4, "activation_bits": 4, "group_size": 16, "activation_symmetric": False},
        {"weight_bits": 4, "group_size": 8, "activation_symmetric": False, "activation_granularity": "group"},
        {"weight_bits": 3, "weight_symmetric": False, "activation_granularity": "tensor"},
        {"method": "rotation", "weight_bits": 4, "activation_bits": 4, "activation_clip": 0.8},
    ],
)
def test_logits_are_those_of_exact_accumulators_bit_for_bit(
    family: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(changes)
    model = tiny_model(family).to(changes.pop("dtype", torch.float32))
    ids = torch.randint(3, 96, (2, 12))
    quantized = quantize(model, [ids], **{**W8A8, **changes})
    integer = to_integers(copy.deepcopy(quantized))
    with torch.no_grad():
        fast = integer(ids).logits
        decoded = integer(ids[:, :1]).logits
        monkeypatch.setattr(QuantizedLinear, "forward", as_integers_would)
        assert torch.equal(fast, quantized(ids).logits)
        assert torch.equal(decoded, quantized(ids[:, :1]).logits)
    assert integer.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[0] == 2


def test_layers_of_one_norm_are_one_product(tiny_llama: LlamaForCausalLM) -> None:
    model = to_integers(quantize(tiny_llama, **W8A8))
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.linear is attention.k_proj.linear is attention.v_proj.linear
    assert mlp.gate_proj.linear is mlp.up_proj.linear
    assert attention.q_proj.linear.weight.shape == (32 + 16 + 16, 32)
    x = torch.randn(1, 3, 32)
    parts = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert torch.equal(torch.cat(parts, -1), attention.q_proj.linear(x))
    # In another order, of another input, and after writing to the same one.
    other = torch.randn(1, 3, 32)
    assert torch.equal(attention.v_proj(other), attention.v_proj.linear(other)[..., 48:])
    assert torch.equal(attention.q_proj(x), parts[0])
    x += 1
    assert torch.equal(attention.q_proj(x), attention.q_proj.linear(x)[..., :32])
    # What was fetched is not kept, and copies have products of their own.
    attention.k_proj(x), attention.v_proj(x)
    assert attention.q_proj.product.source is None
    twin = copy.deepcopy(block)
    assert twin.self_attn.q_proj.product is twin.self_attn.v_proj.product is not attention.q_proj.product


def test_layers_that_treat_their_input_otherwise_stay_apart(tiny_llama: LlamaForCausalLM) -> None:
    quantized = quantize(tiny_llama, **W8A8)
    attention = quantized.model.layers[0].self_attn
    attention.k_proj.activation_bits = 6
    expected = attention.k_proj(torch.ones(1, 32))
    to_integers(quantized)
    assert isinstance(attention.k_proj, IntegerLinear)
    torch.testing.assert_close(attention.k_proj(torch.ones(1, 32)), expected)
    assert quantized.model.layers[1].self_attn.q_proj.linear is quantized.model.layers[1].self_attn.k_proj.linear


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_eight_bit_weights_alone_are_close_to_exact(tokens: int, bias: bool) -> None:
    layer = layer_of(nn.Linear(96, 41, bias=bias), activation_bits=16)
    x = torch.randn(2, tokens, 96).bfloat16()
    exact = layer(x.float())
    output = WeightOnly8(layer)(x)
    assert output.dtype == torch.bfloat16
    # The scale and the output are rounded to 8 bits of mantissa, again for many tokens, again with a bias.
    assert (output.float() - exact).abs().max() <= (5 if bias else 3) * 2**-9 * exact.abs().max()


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_four_bit_weights_alone_are_close_to_exact(group_size: int | None, symmetric: bool) -> None:
    layer = layer_of(
        nn.Linear(192, 48), weight_bits=4, activation_bits=16, group_size=group_size, weight_symmetric=symmetric
    )
    x = torch.randn(2, 5, 192).bfloat16()
    exact = layer(x.float())
    # Each of 192 weights is rounded to 8 bits of mantissa.
    assert (WeightOnly4(layer)(x).float() - exact).norm() <= 0.005 * exact.norm()


@pytest.mark.parametrize(
    ("family", "method", "bits"),
    [("opt_350m", "smoothquant", 8), ("qwen2", "smoothquant", 8), ("llama", "rtn", 4), ("llama", "rotation", 4)],
)
def test_weight_only_models_transform_their_input_and_follow_the_simulation(
    family: str, method: str, bits: int
) -> None:
    made = FAMILIES[family]()
    made.config.update({"intermediate_size": 64, "ffn_dim": 64})
    model = type(made)(made.config).eval().to(torch.bfloat16)
    ids = torch.randint(3, 96, (2, 12))
    quantized = quantize(model, [ids], method=method, weight_bits=bits, activation_bits=16)
    with torch.no_grad():
        simulated = quantized(ids).logits.float()
        fast = to_integers(quantized)(ids).logits.float()
    assert (fast - simulated).norm() < 0.02 * simulated.norm()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_small_embeddings_are_the_rounded_rows(bits: int, tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    rows, head = model.get_input_embeddings().weight.float(), model.lm_head.weight.float()
    ids = torch.randint(3, 96, (2, 12))
    quantized = quantize(model, **W8A8, embedding_bits=bits)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # the groups of 32 are whole rows here
    close = quantized.get_input_embeddings()(torch.arange(96)).float() - rows
    assert (close.abs() <= step * 0.51 + rows.abs() * 2**-8).all()
    layer = quantized.get_output_embeddings()
    assert isinstance(layer, QuantizedLinear)
    assert (layer.dense_weight() - head).abs().max() <= 0.51 * head.abs().max() / (2 ** (bits - 1) - 1)
    assert (layer.weight is quantized.get_input_embeddings().weight) == tied
    with torch.no_grad():
        simulated = quantized(ids).logits
        save_quantized(quantized, tmp_path / "model")
        loaded = sparq.load_quantized(tmp_path / "model")
        assert torch.equal(loaded(ids).logits, simulated)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        embedded = quantized.get_input_embeddings()(ids)
        fast = to_integers(loaded)
        assert torch.equal(fast.get_input_embeddings()(ids), embedded)
        x = torch.randn(1, 3, 32).bfloat16()
        exact = layer(x.float())
        assert (fast.get_output_embeddings()(x).float() - exact).norm() <= 0.01 * exact.norm()
    assert fast.get_input_embeddings().to(torch.float32)(ids).dtype == torch.float32


def test_no_copy_in_floating_point_stays(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 96, (1, 4))
    for bits, bytes_a_weight in ((8, 1), (4, 0.5)):
        quantized = quantize(tiny_llama, method="rtn", weight_bits=bits, activation_bits=8)
        with torch.no_grad():
            quantized(ids)
        weights = sum(layer.weight.numel() for layer in quantized.modules() if isinstance(layer, QuantizedLinear))
        integer = to_integers(quantized)
        with torch.no_grad():
            integer(ids)
        assert not any(isinstance(layer, QuantizedLinear) and layer.out_features for layer in integer.modules())
        tensors = {
            id(value): value
            for layer in integer.model.layers.modules()
            for value in (*vars(layer).values(), *layer.buffers(recurse=False), *layer.parameters(recurse=False))
            if isinstance(value, Tensor)
        }
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor.dim() > 1)
        assert stored == pytest.approx(weights * bytes_a_weight, rel=0.35)  # and a scale of 4 bytes for 32 weights


def test_casting_a_model_on_integers_rounds_no_scale(tiny_opt: PreTrainedModel) -> None:
    integer = to_integers(quantize(tiny_opt, **W8A8))
    layers = [layer for layer in integer.modules() if isinstance(layer, IntegerLinear)]
    before = [(layer.weight_scale.clone(), layer.bias.clone()) for layer in layers]
    integer.to(torch.bfloat16)
    assert all(torch.equal(layer.weight_scale, scale) for layer, (scale, _) in zip(layers, before, strict=True))
    assert all(torch.equal(layer.bias, bias) for layer, (_, bias) in zip(layers, before, strict=True))
    with torch.no_grad():
        assert integer(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16


def test_what_a_kernel_cannot_do_is_one_line(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    half = copy.deepcopy(tiny_llama).to(torch.bfloat16)

    def scheme(weight: int, activation: int, **changes: object) -> dict[str, object]:
        return {"method": "rtn", "weight_bits": weight, "activation_bits": activation, **changes}

    cases = [
        (tiny_llama, None, "is not quantized: call quantize first"),
        (tiny_llama, scheme(16, 8), "weight_bits is 16, so there are no integers"),
        (tiny_llama, scheme(8, 16), r"model is in float32: model\.to\(torch\.bfloat16\) first, or quantize them to 8"),
        (tiny_llama, scheme(8, 8, embedding_bits=8), "the head has activations of 16 bits, .* model is in float32"),
        (tiny_llama, scheme(8, 8, group_size=1), "has a scale for every weight: group_size must be at least 2"),
        (half, scheme(4, 16, group_size=16), "groups of 16: .* 4-bit weights need a multiple of 32"),
        (half, scheme(4, 16), r"mlp\.down_proj has groups of 48: .* need a multiple of 32"),
        (half, scheme(8, 16, group_size=16), "8-bit weights need group_size null"),
        (half, scheme(8, 16, weight_symmetric=False), "8-bit weights need .*weight_symmetric true"),
    ]
    for model, settings_, message in cases:
        quantized = model if settings_ is None else quantize(model, **settings_)
        with pytest.raises(SparqError, match=message) as caught:
            to_integers(quantized)
        assert "\n" not in str(caught.value)
        assert not runs_on_integers(quantized)
    with pytest.raises(SparqError, match="meta has no int8 products"):
        to_integers(quantize(tiny_llama, **W8A8).to("meta"))
    integer = to_integers(quantize(tiny_llama, **W8A8))
    with pytest.raises(SparqError, match="computes with integers already"):
        to_integers(integer)
    with pytest.raises(SparqError, match="save it before to_integers"):
        save_quantized(integer, tmp_path / "model")


def test_odd_sizes_of_layers_are_one_line() -> None:
    odd = QuantizationScheme(method="rtn", weight_bits=4, activation_bits=8)
    layer = QuantizedLinear.round_to_nearest(nn.Linear(33, 8), odd)
    with pytest.raises(AssertionError, match="two integers a byte"):
        IntegerLinear([layer], halves=True)
    with pytest.raises(AssertionError, match="read beyond the weights"):
        WeightOnly8(layer_of(nn.Linear(40, 8), activation_bits=16))
