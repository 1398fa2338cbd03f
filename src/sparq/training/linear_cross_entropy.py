"""Head and cross-entropy in one, in chunks of rows: the logits of all targets are never held together."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 16 << 20
"""Float32 logits of one chunk."""


def linear_cross_entropy(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "pieces hidden"],
    expected: Int[Tensor, " targets"],
    *,
    smoothing: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the sums of smoothed cross-entropy (with gradient), of -log p in nats, and of targets of largest logit.

    With z = W h, the objective is (1 - smoothing) * -log p(expected) + smoothing * mean of -log p over all pieces, and
    its gradient dz = p - (1 - smoothing) * onehot(expected) - smoothing / pieces. The gradients of h and W are computed
    along with the loss, chunk by chunk, those of W added up in float32; the backward only scales them.

    Args:
        hidden: what the head reads, for each target.
        weight: the head's weight.
        expected: the pieces that should come out.
        smoothing: share of the uniform distribution in the target.
    """
    objective, nll, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, expected, smoothing
    )
    return objective, nll, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, expected: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        nll, uniform = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        pieces = weight.shape[0]
        size = max(1, _CHUNK_BYTES // (4 * pieces))
        for rows in (slice(start, start + size) for start in range(0, len(hidden), size)):
            logits = (hidden[rows] @ weight.T).float()
            correct += (logits.argmax(dim=-1) == expected[rows]).sum()
            log_probabilities = torch.log_softmax(logits, dim=-1)
            target = expected[rows, None]
            nll -= log_probabilities.gather(1, target).sum()
            if smoothing:
                uniform -= log_probabilities.sum() / pieces
            if not (wants_hidden or wants_weight):
                continue
            gradient = log_probabilities.exp_()
            if smoothing:
                gradient -= smoothing / pieces
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), smoothing - 1).expand_as(target))
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll, correct)
        return (1 - smoothing) * nll + smoothing * uniform, nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _nll: Tensor, _correct: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)
        return *gradients, None, None
