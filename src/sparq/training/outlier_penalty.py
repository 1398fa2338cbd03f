"""Penalties on the outliers of the blocks' outputs, added to the loss while a model trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sparq.data import Batch
from sparq.training.block_outputs import BlockOutputs


class OutlierPenalty:
    """The kurtosis and the largest element of what each block gives for each token.

        penalty = sum over tokens of the mean over blocks of  w_k kurtosis(x) + w_m max_i |x_i|

    with x the block's output at one token, in float32. Kurtosis as a training objective is from Chmiel et al. 2020
    (arXiv 2002.07686, of weights) and Nrusimha et al. 2024 (arXiv 2404.03605, of activations). It is added up over
    tokens as the cross-entropy is over targets, so that neither packing nor the cut into micro-batches changes it;
    padding is left out.

    Args:
        model: a causal LM, with or without adapters; its blocks are watched in training mode.
        kurtosis: w_k.
        max_norm: w_m.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, kurtosis: float, max_norm: float) -> None:
        self.kurtosis, self.max_norm = kurtosis, max_norm
        self._outputs = BlockOutputs(model, self._see)
        self._parts: list[Tensor] = []

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Collect the parts of the penalty, one a block, while the model reads a batch."""
        self._parts = []
        try:
            with self._outputs.watching(batch):
                yield self._parts
        finally:
            self._parts = []

    def _see(self, _index: int, hidden: Float[Tensor, "tokens hidden"]) -> None:
        self._parts.append(self.of(hidden) / self._outputs.num_blocks)

    def of(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, ""]:
        """Return the sum over the tokens of one block's output."""
        total = hidden.new_zeros((), dtype=torch.float32)
        if self.kurtosis:
            total = total + self.kurtosis * token_kurtosis(hidden).sum()
        if self.max_norm:
            total = total + self.max_norm * token_max_norm(hidden).sum()
        return total


def token_kurtosis(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    """Return the population kurtosis over the channels of each token, with a gradient.

    With d = x - mean(x) and m_k = mean(d^k):

        kurtosis = m_4 / m_2^2
        d kurtosis / d x = 4 / (n m_2^2) * (d^3 - m_3 - (m_4 / m_2) d)

    Only x is kept for the backward. There is no epsilon: it is NaN where all channels are equal.
    """
    result: Tensor = _TokenKurtosis.apply(hidden)  # type: ignore[no-untyped-call]
    return result


def token_max_norm(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    """Return the largest absolute channel of each token; the gradient goes to that channel, the first of equal ones."""
    with torch.no_grad():
        largest = hidden.abs().argmax(dim=-1, keepdim=True)
    return _widened(hidden.gather(-1, largest)).abs().squeeze(-1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _TokenKurtosis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        _, squares = _deviations(hidden)
        return squares.square().mean(dim=-1) / squares.mean(dim=-1).square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        deviation, squares = _deviations(hidden)
        second, fourth = (x.mean(dim=-1, keepdim=True) for x in (squares, squares.square()))
        cubes = squares.mul_(deviation)
        cubes -= cubes.mean(dim=-1, keepdim=True)
        cubes -= deviation.mul_(fourth / second)
        return cubes.mul_(grad[..., None] * 4 / (hidden.shape[-1] * second.square())).to(hidden.dtype)


def _deviations(hidden: Tensor) -> tuple[Tensor, Tensor]:
    wide = _widened(hidden)
    deviation = wide - wide.mean(dim=-1, keepdim=True)
    return deviation, deviation.square()
