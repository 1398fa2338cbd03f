"""Dropout by bit masks: on a CPU PyTorch's own took 29 % of the time of a LoRA update."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LEVELS = 1 << 15
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of a number's size in bytes."""


class Dropout(nn.Module):
    """Dropout with a rate in steps of 2^-15; four elements share a random number of 64 bits.

    PyTorch's `bernoulli_` draws one number an element, on one thread, and products with booleans are not vectorized.
    Elements are independent here too, and what is dropped follows PyTorch's generator, so that a restored random state
    restores it.

    Args:
        rate: probability that an element becomes 0; the others are multiplied by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.kept = round((1 - rate) * _LEVELS)
        self.p = 1 - self.kept / _LEVELS

    @property
    def scale(self) -> float:
        """The factor on what is kept."""
        return _LEVELS / self.kept

    def mask(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return integers of the size of the elements: all bits set where one is kept, none where it is dropped."""
        count = x.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        numbers = words.view(torch.int16)[:count].view(x.shape)
        # Of 0 to 2^15 - 1 those below `kept` become negative, and these -1, all bits set.
        kept = numbers.bitwise_and_(_LEVELS - 1).sub_(self.kept).clamp_(-1, 0)
        return kept.to(_INTEGERS[x.element_size()])

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Drop elements in training, none otherwise; on other devices than a CPU PyTorch does it."""
        if not self.training or self.kept == _LEVELS:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.p)
        out: Tensor = _Masked.apply(x, self.mask(x), self.scale)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        """Name the rate in the printed model."""
        return f"p={self.p:.4g}"


def masked(x: Float[Tensor, "*shape"], mask: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the elements whose mask has all bits set, and 0 for the others, without a gradient."""
    return x.view(mask.dtype).bitwise_and(mask).view(x.dtype)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return masked(x, mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return masked(grad.contiguous(), mask).mul_(ctx.scale), None, None
