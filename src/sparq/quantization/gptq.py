"""GPTQ: round the columns of a weight matrix one after another, and let those to come make up for the error.

Frantar et al. 2023, arXiv 2210.17323, section 3. The layer's error on calibration inputs X [tokens, inputs] is
||(W - Q) X^T||^2 = tr((W - Q) H (W - Q)^T) with H = X^T X. Rounding column j with the error e_j = (w_j - q_j) / U_jj
and adding -e_j U_jk to every later column k is optimal for that column; U is the upper Cholesky factor of H^-1.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sparq.errors import SparqError
from sparq.quantization.grid import Grid

_BLOCK = 128
"""Columns whose corrections of later blocks are applied in one product."""


def gptq_round(
    weight: Float[Tensor, "outputs inputs"],
    hessian: Float[Tensor, "inputs inputs"],
    grid: Grid,
    *,
    damping: float = 0.01,
    by_importance: bool = True,
) -> Int8[Tensor, "outputs inputs"]:
    """Return the weights' integers on a grid of fixed scales, chosen to keep the layer's output on calibration data.

    Args:
        weight: the layer's weights.
        hessian: X^T X, or any multiple of it, over the calibration tokens.
        grid: scale and zero point of each row and group, taken before any column is rounded.
        damping: share of the mean diagonal that is added to the diagonal, so that H has an inverse.
        by_importance: round the columns of large inputs first (`act_order` of the authors' code), while there are most
            others left to make up for them.

    Raises:
        SparqError: the hessian cannot be inverted even with a hundred times the damping.
    """
    hessian = hessian.double().clone()
    weight = weight.float().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1.0
    weight[:, unused] = 0.0
    columns = weight.shape[1]
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True) if by_importance else torch.arange(columns, device=diagonal.device)
    factor = _inverse_factor(hessian[order][:, order], damping).float()
    weight = weight[:, order]
    integers = torch.empty_like(weight, dtype=torch.int8)
    ordered = order.tolist()
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = weight.new_empty(weight.shape[0], end - start)
        for j in range(start, end):
            column = grid.column(ordered[j], columns)
            integers[:, j : j + 1] = column.round(weight[:, j : j + 1])
            error = (weight[:, j : j + 1] - column.value(integers[:, j : j + 1])) / factor[j, j]
            weight[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            errors[:, j - start] = error[:, 0]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return integers[:, torch.argsort(order)]


def _inverse_factor(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return the upper Cholesky factor of the damped hessian's inverse."""
    mean = float(hessian.diagonal().mean())
    for share in (damping, 10 * damping, 100 * damping):
        damped = hessian + share * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
            return upper
    raise SparqError(
        "the calibration inputs of a layer have no invertible covariance, even damped by"
        f" {100 * damping:g} of its mean: give more calibration tokens or a larger damping"
    )
