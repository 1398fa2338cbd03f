"""Orthogonal matrices that spread an outlier over all channels, and products with them.

A Hadamard matrix has entries of one size, +-1 / sqrt(n), and orthogonal rows. Orders 2^k are Sylvester's; an order m
with q = m - 1 a prime that leaves 3 modulo 4, or q = m / 2 - 1 one that leaves 1, is Paley's (1933); Kronecker products
give the rest. Not every width has one that is built this way; `hadamard_factors` then leaves blocks.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=16)
def hadamard_factors(width: int) -> tuple[int, int, int]:
    """Return blocks, m and 2^k with width = blocks * m * 2^k: `blocks` Hadamard matrices of order m * 2^k side by side.

    There is one block where any order m is at hand, and the smallest such m is taken; else m is 1.
    """
    power = width & -width
    while power:
        if _is_order(width // power):
            return 1, width // power, power
        power //= 2
    return width // (width & -width), 1, width & -width


@lru_cache(maxsize=16)
def _matrix(order: int) -> Float[Tensor, "order order"]:
    """Return a Hadamard matrix of ones, float64, of order 1, 2 or one of Paley's."""
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    first = order % 4 == 0 and _is_prime(order - 1)
    q = order - 1 if first else order // 2 - 1
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if first else 1.0
    core[1:, 1:] = character[(index[:, None] - index) % q]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return core + identity
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(identity, minus)


def apply_hadamard(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Return x H, where H is the orthogonal matrix of `hadamard_factors(width)`, in the type of x."""
    blocks, order, power = hadamard_factors(x.shape[-1])
    result = x.reshape(-1, order)
    if order > 1:
        result = result @ _matrix(order).to(x)
    result = result.reshape(-1, blocks, power, order)
    half = power
    while half > 1:  # Sylvester's butterflies: log2(power) passes
        half //= 2
        result = result.view(-1, power // (2 * half), 2, half, order)
        result = torch.stack((result[:, :, 0] + result[:, :, 1], result[:, :, 0] - result[:, :, 1]), dim=2)
    return result.reshape(x.shape) / math.sqrt(order * power)


def random_rotation(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """Return a random orthogonal matrix in float64: a Hadamard matrix with random signs of its rows where there is one.

    Tseng et al. 2024 (QuIP#, arXiv 2402.04396, section 3) and Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456).
    """
    if hadamard_factors(width)[0] == 1:
        signs = torch.randint(0, 2, (width, 1), generator=generator).double() * 2 - 1
        return signs * apply_hadamard(torch.eye(width, dtype=torch.float64))
    orthogonal, triangle = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    # The signs make the distribution uniform (Mezzadri 2007).
    uniform: Tensor = orthogonal * triangle.diagonal().sign()
    return uniform


def _is_order(m: int) -> bool:
    if m <= 2:
        return True
    paley_two = m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _is_prime(m // 2 - 1)
    return m % 4 == 0 and (_is_prime(m - 1) or paley_two)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
