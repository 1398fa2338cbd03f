"""Hadamard matrices by their definition, and the fast product against the matrix."""

import math

import pytest
import torch

from sparq.quantization.hadamard import apply_hadamard, hadamard_factors, random_rotation

WIDTHS = [1, 2, 4, 12, 20, 28, 36, 44, 64, 76, 576, 768, 1536, 3072, 4864, 8192]


@pytest.mark.parametrize("width", WIDTHS)
def test_entries_of_one_size_and_orthogonal_rows(width: int) -> None:
    assert hadamard_factors(width)[0] == 1
    some = torch.arange(0, width, max(1, width // 100))
    rows = apply_hadamard(torch.nn.functional.one_hot(some, width).double())
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, 1 / math.sqrt(width)), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "factors"), [(7, (7, 1, 1)), (40, (1, 20, 2)), (88, (1, 44, 2)), (11008, (1, 5504, 2))]
)
def test_widths_without_a_matrix_of_their_own_are_cut_into_blocks(width: int, factors: tuple[int, int, int]) -> None:
    assert hadamard_factors(width) == factors
    assert math.prod(factors) == width


def test_blocks_are_orthogonal_too() -> None:
    width = 4 * 23 * 2  # 92 = 4 * 23 and 184 are no order of Paley's
    blocks, order, power = hadamard_factors(width)
    matrix = apply_hadamard(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert int((matrix[0] != 0).sum()) == order * power == width // blocks


def test_an_outlier_is_spread_and_shapes_and_types_are_kept() -> None:
    x = torch.zeros(2, 3, 48)
    x[1, 2, 5] = 100.0
    spread = apply_hadamard(x)
    assert spread.shape == x.shape
    torch.testing.assert_close(spread[1, 2].abs(), torch.full((48,), 100 / math.sqrt(48)))
    assert apply_hadamard(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [9, 48, 92])
def test_random_rotations_are_orthogonal_and_differ(width: int) -> None:
    first, second = (random_rotation(width, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(first @ first.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.allclose(first, second)
    assert torch.equal(first, random_rotation(width, torch.Generator().manual_seed(0)))
