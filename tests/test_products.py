"""Exact products of small integers on either kind of processor: against wide integers, compiled, refused."""

from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sparq.errors import SparqError
from sparq.quantization import QuantizationScheme, QuantizedLinear, quantize, to_integers
from sparq.quantization.integer_linear import IntegerLinear
from sparq.quantization.products import DIAGONAL_ROWS, float_product, grouped_product, pack_halves, unpack_halves


def integers_between(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


@given(st.integers(1, 5), st.integers(1, 9))
def test_two_integers_a_byte_round_trip(rows: int, half: int) -> None:
    integers = integers_between(-8, 7, rows, 2 * half)
    packed = pack_halves(integers)
    assert packed.shape == (rows, half)
    assert torch.equal(unpack_halves(packed), integers)
    assert torch.equal(unpack_halves(packed[0]), integers[0])


INSTRUCTIONS = pytest.mark.parametrize("vnni", [True, False])
"""Either way of products on a CPU: of integers with its instructions for them, and by way of float32."""


def processor(*, vnni: bool) -> AbstractContextManager[object]:
    return patch("torch.cpu._is_vnni_supported", return_value=vnni)


@INSTRUCTIONS
@given(tokens=st.sampled_from([1, 3, 20, 40]), groups=st.sampled_from([1, 2, 5]), size=st.integers(2, 7))
def test_grouped_products_are_those_of_wide_integers(tokens: int, groups: int, size: int, vnni: bool) -> None:
    left, right = integers_between(-128, 127, tokens, groups * size), integers_between(-128, 127, 6, groups * size)
    slow = torch.einsum("tgs,ogs->gto", left.view(tokens, groups, size).long(), right.view(6, groups, size).long())
    with processor(vnni=vnni):
        assert torch.equal(grouped_product(left, right, groups).long(), slow)
        if groups * size % 2 == 0 and groups * size > 2:
            small = right >> 4
            product = grouped_product(left, pack_halves(small), groups, halves=True)
            assert torch.equal(product, grouped_product(left, small, groups))


@INSTRUCTIONS
def test_the_largest_sums_fit(vnni: bool) -> None:
    left, right = torch.full((2, 16384), -128, dtype=torch.int8), torch.full((3, 16384), -128, dtype=torch.int8)
    with processor(vnni=vnni):
        assert grouped_product(left, right, 1).unique().tolist() == [16384 * 128 * 128]


def test_float_products_are_exact_over_several_blocks() -> None:
    """700 outputs of 1,024 inputs are two blocks; 2,100 inputs are three sums, whose odd ones float32 cannot hold."""
    left, right = integers_between(-128, 127, 3, 2100), integers_between(-128, 127, 700, 2100)
    assert torch.equal(float_product(left, right).long(), left.long() @ right.long().t())
    large = torch.full((1, 2100), 127, dtype=torch.int8)
    assert float_product(large, large).item() == 2100 * 127**2 > 2**24


def saturating_product(left: Tensor, right: Tensor) -> Tensor:
    """What oneDNN computes with AVX2: activations shifted to unsigned, pairs of products added in 16 bits."""
    products = (left.long() + 128).unsqueeze(-1) * right.long()  # [rows, inputs, outputs]
    pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(1) - 128 * right.long().sum(0)).int()


def test_a_processor_without_exact_products_is_refused(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight, four = (quantize(tiny_llama, method="rtn", weight_bits=bits, activation_bits=8) for bits in (8, 4))
    monkeypatch.setattr(torch, "_int_mm", saturating_product)
    with processor(vnni=True):
        with pytest.raises(SparqError, match="cpu's int8 products are not exact for weights of 8 bits"):
            to_integers(eight)
        to_integers(four)  # sums of two products with small weights fit
    with processor(vnni=False):
        to_integers(eight)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in PyTorch 2.13
@INSTRUCTIONS
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 32)])
def test_compiled_layers_give_the_same(bits: int, group_size: int | None, vnni: bool) -> None:
    scheme = QuantizationScheme(method="rtn", weight_bits=bits, activation_bits=8, group_size=group_size)
    layer = QuantizedLinear.round_to_nearest(nn.Linear(96, 32), scheme)
    integer = IntegerLinear([layer], halves=bits == 4)
    torch._dynamo.reset()  # what was compiled for one processor would serve the other
    compiled = torch.compile(integer, dynamic=False, fullgraph=True)
    # A single token has strides of its own; so many tokens that groups are done one after the other.
    for tokens in (1, 3) if group_size is None else (1, 3, DIAGONAL_ROWS // 3 + 1):
        x = torch.randn(1, tokens, 96)
        with torch.no_grad(), processor(vnni=vnni):
            torch.testing.assert_close(compiled(x), integer(x), rtol=1e-6, atol=1e-6)
