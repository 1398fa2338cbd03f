"""Next-token cross-entropy with label smoothing, on the positions that the templates mark."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparq.data import IGNORE, Batch


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """Sums over the target tokens of one batch; divide by `num_targets` for means.

    Attributes:
        objective: smoothed cross-entropy, the one with a gradient.
        nll: plain negative log-likelihood in nats.
        num_correct: targets that had the largest logit.
        num_targets: target tokens, the end token counted.
    """

    objective: Float[Tensor, ""]
    nll: float
    num_correct: int
    num_targets: int


def target_loss(
    logits: Float[Tensor, "batch length pieces"], labels: Int[Tensor, "batch length"], *, smoothing: float = 0.0
) -> BatchLoss:
    """Compare the logits at position i with the label at i + 1, in float32, leaving out `IGNORE`.

    The objective is (1 - smoothing) * nll + smoothing * (mean over the vocabulary of -log p), the usual label smoothing
    (papers: 0.1 through VoxtLM's recipe).
    """
    expected = labels[:, 1:].flatten()
    counts = expected != IGNORE
    # Only rows that count are widened to float32: a long prompt costs no float32 logits.
    chosen = logits[:, :-1].flatten(0, 1)[counts].float()
    expected = expected[counts]
    log_probabilities = torch.log_softmax(chosen, dim=-1)
    nll = nn.functional.nll_loss(log_probabilities, expected, reduction="sum")
    objective = nll
    if smoothing:
        objective = (1 - smoothing) * nll - smoothing * log_probabilities.mean(dim=-1).sum()
    with torch.no_grad():
        correct = int((chosen.argmax(dim=-1) == expected).sum())
    return BatchLoss(objective=objective, nll=float(nll.detach()), num_correct=correct, num_targets=len(expected))


def batch_loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> BatchLoss:
    """Run a causal LM on a batch and compare; right padding needs no mask."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return target_loss(logits, batch.labels, smoothing=smoothing)
