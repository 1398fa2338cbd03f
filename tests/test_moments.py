"""Kurtosis against scipy, of one tensor and of a stream."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparq.evaluation.moments import Moments, kurtosis


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])
def test_kurtosis_of_a_normal_distribution_far_from_zero_is_three(mean: float) -> None:
    x = mean + torch.randn(200_000)
    assert x.dtype == torch.float32
    assert kurtosis(x).item() == pytest.approx(3, abs=0.05)
    assert Moments.of(x).kurtosis == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e8, 1e30])
def test_kurtosis_does_not_depend_on_scale_or_shift(scale: float) -> None:
    x = torch.randn(4, 1000, dtype=torch.float64) ** 3
    expected = torch.tensor(stats.kurtosis(x.numpy(), axis=1, fisher=False))
    torch.testing.assert_close(kurtosis(x * scale), expected)
    torch.testing.assert_close(kurtosis(x * scale + 5 * scale), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kurtosis_equals_scipy_on_low_precision_data(dtype: torch.dtype) -> None:
    x = (torch.randn(50, 40) * 100).to(dtype)  # fourth powers overflow float16
    expected = stats.kurtosis(x.double().numpy().ravel(), fisher=False)
    assert kurtosis(x.flatten()).item() == pytest.approx(expected, rel=1e-12)
    assert Moments.of(x).kurtosis == pytest.approx(expected, rel=1e-12)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=60).filter(lambda x: np.std(x) > 1e-2),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_merged_moments_equal_those_of_the_whole(values: list[float], cuts: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    edges = sorted({0, len(x), *(cut for cut in cuts if cut < len(x))})
    chunks = [Moments.of(x[a:b]) for a, b in itertools.pairwise(edges)]
    left = chunks[0]
    for chunk in chunks[1:]:
        left = left.merge(chunk)
    right = chunks[-1]
    for chunk in reversed(chunks[:-1]):
        right = chunk.merge(right)
    for merged in (left, right):
        assert merged.count == len(x)
        assert merged.mean == pytest.approx(x.mean().item(), abs=1e-9)
        assert merged.kurtosis == pytest.approx(stats.kurtosis(x.numpy(), fisher=False), rel=1e-6)
        assert merged.m3 == pytest.approx(len(x) * stats.moment(x.numpy(), 3), rel=1e-6, abs=1e-4)


def test_merging_survives_a_large_mean() -> None:
    chunks = (1e4 + torch.randn(100, 2000)).float()
    merged = Moments.of(chunks[0])
    for chunk in chunks[1:]:
        merged = merged.merge(Moments.of(chunk))
    assert merged.kurtosis == pytest.approx(stats.kurtosis(chunks.double().numpy().ravel(), fisher=False), rel=1e-9)


def test_kurtosis_of_a_constant_is_undefined() -> None:
    assert math.isnan(kurtosis(torch.full((7,), 0.1)).item())
    assert math.isnan(Moments.of(torch.full((7,), 0.1)).kurtosis)
