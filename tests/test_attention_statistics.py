"""Figures of attention maps that are made by hand."""

import math

import pytest
import torch

from sparq.evaluation.attention_statistics import AttentionSums


def test_attention_of_a_pure_sink() -> None:
    p = torch.zeros(2, 5, 5)
    p[:, :, 0] = 1
    sums = AttentionSums.of(p)
    assert (sums.num_rows, sums.num_choices) == (10, 8)
    assert (sums.mass, sums.first_token, sums.sink, sums.entropy) == (10, 8, 8, 0)


def test_uniform_attention_has_no_sink_and_the_largest_entropy() -> None:
    p = torch.ones(1, 40, 40).tril()
    p /= p.sum(dim=-1, keepdim=True)
    sums = AttentionSums.of(p)
    assert sums.sink == 0
    assert sums.entropy == pytest.approx(sum(math.log(n) for n in range(2, 41)), rel=1e-6)
    assert sums.first_token == pytest.approx(sum(1 / n for n in range(2, 41)), rel=1e-6)


def test_entropy_does_not_depend_on_mass_and_a_row_without_mass_counts_as_zero() -> None:
    p = torch.rand(3, 6, 6).tril()
    whole, part = AttentionSums.of(p), AttentionSums.of(p * 0.01)
    assert part.entropy == pytest.approx(whole.entropy, rel=1e-5)
    assert part.mass == pytest.approx(0.01 * whole.mass)
    assert AttentionSums.of(torch.zeros(3, 6, 6)).entropy == 0


def test_a_sink_elsewhere_counts_as_a_sink_but_not_as_the_first_token() -> None:
    p = torch.zeros(1, 12, 12)
    p[0, 0, 0] = p[0, 1, 1] = 1
    p[0, 2:, 2] = 1
    sums = AttentionSums.of(p)
    assert (sums.first_token, sums.sink, sums.num_choices) == (0, 10, 11)
