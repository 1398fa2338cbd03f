"""Uniform quantization, its scheme, and the linear layer built on it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparq.errors import SparqError
from sparq.quantization import QuantizationScheme, QuantizedLinear
from sparq.quantization.packing import pack, unpack
from sparq.quantization.products import integer_accumulators
from sparq.quantization.quantizer import (
    dequantize,
    fake_quantize,
    largest_integer,
    quantize_asymmetric,
    quantize_symmetric,
)

BITS = st.integers(2, 8)
VALUES = st.one_of(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.floats(-4, 4, width=32),
    st.just(0.0),
    st.integers(-15, 15).map(lambda n: n / 2),
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, int | None]:
    """A matrix, and a group size that divides its columns."""
    groups, size, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    columns = groups * size
    values = draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values).reshape(rows, columns), (None if draw(st.booleans()) else size)


def per_element(scale: Tensor, x: Tensor) -> Tensor:
    return scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)


@given(tensors(), BITS)
def test_symmetric_integers_are_in_range_and_the_error_is_at_most_half_a_scale(
    case: tuple[Tensor, int | None], bits: int
) -> None:
    x, group_size = case
    integers, scale = quantize_symmetric(x, bits, group_size)
    assert integers.dtype == torch.int8
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    error = (x.double() - dequantize(integers, scale).double()).abs()
    assert bool((error <= per_element(scale, x).double() * (0.5 + 1e-5)).all())


@given(tensors(), BITS)
def test_asymmetric_integers_are_in_range_and_the_error_is_at_most_half_a_scale(
    case: tuple[Tensor, int | None], bits: int
) -> None:
    x, group_size = case
    integers, scale, zero_point = quantize_asymmetric(x, bits, group_size)
    for values in (integers, zero_point):
        assert values.dtype == torch.int8
        assert values.min() >= -(2 ** (bits - 1))
        assert values.max() <= 2 ** (bits - 1) - 1
    restored = dequantize(integers, scale, zero_point)
    error = (x.double() - restored.double()).abs()
    assert bool((error <= per_element(scale, x).double() * (0.5 + 1e-4)).all())
    assert bool((restored[x == 0] == 0).all()), "zero must be exact"


@given(tensors(), BITS)
def test_symmetric_quantization_is_idempotent(case: tuple[Tensor, int | None], bits: int) -> None:
    x, group_size = case
    integers, scale = quantize_symmetric(x, bits, group_size)
    again, scale_again = quantize_symmetric(dequantize(integers, scale), bits, group_size)
    assert torch.equal(integers, again)
    torch.testing.assert_close(dequantize(again, scale_again), dequantize(integers, scale), rtol=1e-6, atol=0)


@given(tensors(), BITS, st.booleans())
def test_fake_quantization_is_quantize_then_dequantize_bit_for_bit(
    case: tuple[Tensor, int | None], bits: int, symmetric: bool
) -> None:
    x, _ = case
    quantized = quantize_symmetric(x, bits) if symmetric else quantize_asymmetric(x, bits)
    assert torch.equal(fake_quantize(x, bits, symmetric=symmetric), dequantize(*quantized))


@given(tensors(), BITS)
def test_a_group_is_quantized_as_if_it_were_alone(case: tuple[Tensor, int | None], bits: int) -> None:
    x, group_size = case
    size = group_size or x.shape[1]
    integers, scale = quantize_symmetric(x, bits, group_size)
    for index, part in enumerate(x.split(size, 1)):
        alone, alone_scale = quantize_symmetric(part.contiguous(), bits)
        assert torch.equal(integers[:, index * size : (index + 1) * size], alone)
        assert torch.equal(scale[:, index : index + 1], alone_scale)


def test_symmetric_quantization_against_the_equation_in_plain_python() -> None:
    row = [0.3, -1.27, 0.004, 0.016, -0.024]
    integers, scale = quantize_symmetric(torch.tensor([row]), 8)
    assert scale.item() == pytest.approx(1.27 / 127, rel=1e-6)
    assert integers.tolist() == [[round(x / 0.01) for x in row]] == [[30, -127, 0, 2, -2]]


def test_asymmetric_quantization_against_the_equation_in_plain_python() -> None:
    row = [-1.0, 0.0, 0.49, 2.0]
    integers, scale, zero_point = quantize_asymmetric(torch.tensor([row]), 4)
    assert scale.item() == pytest.approx(3 / 15, rel=1e-6)
    assert zero_point.item() == -8 + 5
    assert integers.tolist() == [[round(x / 0.2) - 3 for x in row]] == [[-8, -3, -1, 7]]


def test_rounding_is_half_to_even() -> None:
    # The largest value makes the scale exactly 1, so that halves are exact ties.
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_symmetric(x, 4)[0].tolist() == [[7, 0, 2, 2, 0, -2, -2]]


def test_zero_rows_have_scale_one_and_no_nan() -> None:
    zeros = torch.zeros(2, 6)
    integers, scale = quantize_symmetric(zeros, 4, 3)
    assert torch.equal(scale, torch.ones(2, 2))
    assert not integers.any()
    _, scale, zero_point = quantize_asymmetric(zeros, 4, 3)
    assert torch.equal(scale, torch.ones(2, 2))
    assert torch.equal(zero_point, torch.full((2, 2), -8, dtype=torch.int8))
    assert torch.equal(fake_quantize(zeros, 4, symmetric=False), zeros)


def test_values_too_small_for_a_normal_scale_become_zeros() -> None:
    tiny = torch.full((1, 4), 1e-44)
    integers, scale = quantize_symmetric(tiny, 8)
    assert scale.item() == 1
    assert not integers.any()


def test_quantization_computes_in_float32_whatever_the_input_is() -> None:
    x = torch.randn(3, 64).bfloat16()
    low, high = quantize_symmetric(x, 8), quantize_symmetric(x.float(), 8)
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])
    assert low[1].dtype == torch.float32


def test_asymmetric_beats_symmetric_on_one_sided_values() -> None:
    x = torch.rand(8, 256)
    symmetric = (dequantize(*quantize_symmetric(x, 4)) - x).square().mean()
    asymmetric = (dequantize(*quantize_asymmetric(x, 4)) - x).square().mean()
    assert asymmetric < symmetric / 3  # half the step is a quarter of the error


@given(st.integers(2, 7), st.integers(1, 19), st.integers(1, 3))
def test_packing_is_one_string_of_bits_and_back(bits: int, columns: int, rows: int) -> None:
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).to(torch.int8)
    packed = pack(integers, bits)
    strings = ["".join(f"{value % 2**bits:0{bits}b}" for value in reversed(row)) for row in integers.tolist()]
    expected = [list(int(string, 2).to_bytes(-(-columns * bits // 8), "little")) for string in strings]
    assert packed.tolist() == expected
    assert torch.equal(unpack(packed, bits, columns), integers)


def scheme(**changes: object) -> QuantizationScheme:
    return QuantizationScheme.from_dict({"method": "rtn", "weight_bits": 8, "activation_bits": 8, **changes})


@given(
    st.integers(2, 8), st.integers(2, 8), st.sampled_from([None, 16, 32]),
    st.booleans(), st.booleans(), st.sampled_from(["token", "tensor"]), st.booleans(),
)  # fmt: skip
def test_the_simulated_layer_equals_exact_integer_arithmetic(
    weight_bits: int, activation_bits: int, group_size: int | None,
    weight_symmetric: bool, activation_symmetric: bool, granularity: str, smoothed: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(weight_bits * 8 + activation_bits)
    linear = nn.Linear(96, 24)
    chosen = scheme(
        weight_bits=weight_bits, activation_bits=activation_bits, group_size=group_size,
        weight_symmetric=weight_symmetric, activation_symmetric=activation_symmetric,
        activation_granularity=granularity,
    )  # fmt: skip
    factor = torch.rand(96, generator=generator) + 0.5 if smoothed else None
    layer = QuantizedLinear.round_to_nearest(linear, chosen, factor=factor, divide_input=smoothed)
    x = torch.randn(2, 5, 96, generator=generator) * 3
    exact = layer.integer_forward(x)
    assert layer(x).shape == (2, 5, 24)
    # Relative to the size of what is summed, for sums may cancel.
    size = exact.abs().max()
    assert (layer(x).double() - exact).abs().max() <= 3e-6 * size


def test_per_channel_output_is_the_product_of_both_scales_and_the_accumulator() -> None:
    layer = QuantizedLinear.round_to_nearest(nn.Linear(64, 16, bias=False), scheme(weight_bits=4))
    x = torch.randn(7, 64)
    integers, scale = quantize_symmetric(x, 8)
    assert layer.weight_scale is not None
    accumulators = integers.long() @ layer.weight.long().T  # torch's own integers
    torch.testing.assert_close(layer(x), scale * layer.weight_scale.T * accumulators, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        integer_accumulators(integers[:, None].int(), layer.weight[:, None].int()).squeeze(-1).long(),
        accumulators,
    )


def test_sixteen_bits_leave_the_layer_as_it_is() -> None:
    linear = nn.Linear(32, 8)
    layer = QuantizedLinear.round_to_nearest(linear, scheme(weight_bits=16, activation_bits=16))
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight.data_ptr() != linear.weight.data_ptr()


def test_more_bits_are_closer_to_the_float_layer() -> None:
    linear, x = nn.Linear(256, 64), torch.randn(16, 256)
    errors = []
    for bits in (2, 4, 6, 8):
        layer = QuantizedLinear.round_to_nearest(linear, scheme(weight_bits=bits, activation_bits=bits))
        errors.append((layer(x) - linear(x)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * linear(x).norm()


def test_tokens_do_not_influence_each_other() -> None:
    layer = QuantizedLinear.round_to_nearest(nn.Linear(32, 8), scheme(weight_bits=4, activation_bits=4))
    x = torch.randn(6, 32)
    louder = x.clone()
    louder[3] *= 1000
    others = [0, 1, 2, 4, 5]
    assert torch.equal(layer(x)[others], layer(louder)[others])


def test_nan_activations_stay_visible() -> None:
    layer = QuantizedLinear.round_to_nearest(nn.Linear(8, 4), scheme())
    x = torch.zeros(2, 8)
    x[1, 3] = float("nan")
    assert bool(layer(x)[0].isfinite().all())
    assert bool(layer(x)[1].isnan().all())


def test_casting_and_copying_keep_float32_scales_and_drop_the_cached_weights() -> None:
    layer = QuantizedLinear.round_to_nearest(nn.Linear(32, 8), scheme(), factor=torch.rand(32) + 0.5, divide_input=True)
    before = layer(torch.ones(1, 32))
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.weight_scale is not None
    assert cast.input_scale is not None
    assert (cast.weight_scale.dtype, cast.input_scale.dtype) == (torch.float32, torch.float32)
    assert cast(torch.ones(1, 32).bfloat16()).dtype == torch.bfloat16
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias", "input_scale"}
    other = QuantizedLinear.round_to_nearest(nn.Linear(32, 8), scheme(), factor=torch.ones(32), divide_input=True)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(torch.ones(1, 32)), other(torch.ones(1, 32)))
    assert not torch.equal(layer(torch.ones(1, 32)), before)


def test_largest_integer() -> None:
    assert [largest_integer(bits) for bits in (2, 4, 8)] == [1, 7, 127]


def test_scheme_names_and_round_trip() -> None:
    chosen = scheme(method="smoothquant", weight_bits=4, activation_bits=4, group_size=64, smoothing_alpha=0.7)
    assert chosen.name == "w4a4-smoothquant"
    assert QuantizationScheme.from_dict(chosen.to_dict()) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "smoothquan"}, r"unknown quantization method 'smoothquan': did you mean 'smoothquant'\?"),
        ({"weight_bits": 1}, "weight_bits is 1; it must be 2 to 8, or 16"),
        ({"activation_bits": 12}, "activation_bits is 12; it must be 2 to 8, or 16"),
        ({"weight_bits": 4.0}, "weight_bits is 4.0; it must be 2 to 8"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"smoothing_alpha": 1.5}, "smoothing_alpha is 1.5; it must be a number from 0 to 1"),
        ({"smoothing_alpha": float("nan")}, "smoothing_alpha is nan"),
        ({"group_size": 0}, "group_size is 0; it must be a positive number"),
        (
            {"activation_granularity": "tokens"},
            "unknown activation granularity 'tokens': did you mean 'token'",
        ),
        ({"weight_symmetric": "yes"}, "weight_symmetric is 'yes'; it must be true or false"),
        ({"weight_bit": 4}, "unknown quantization setting 'weight_bit': did you mean 'weight_bits'"),
    ],
)
def test_scheme_mistakes_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SparqError, match=message) as caught:
        scheme(**changes)
    assert "\n" not in str(caught.value)


def test_scheme_needs_its_bits() -> None:
    with pytest.raises(SparqError, match="the quantization setting 'activation_bits' is missing"):
        QuantizationScheme.from_dict({"method": "rtn", "weight_bits": 8})
