"""Next-token cross-entropy with label smoothing, on the positions that the templates mark."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.data import IGNORE, Batch
from sparq.training.linear_cross_entropy import linear_cross_entropy
from sparq.training.outlier_penalty import OutlierPenalty


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """Sums over the target tokens of one batch; divide by `num_targets` for means.

    Attributes:
        objective: smoothed cross-entropy and the penalty, the one with a gradient.
        nll: plain negative log-likelihood in nats.
        num_correct: targets that had the largest logit.
        num_targets: target tokens, the end token counted.
        penalty: the part of the objective that is no cross-entropy.
    """

    objective: Float[Tensor, ""]
    nll: Float[Tensor, ""]
    num_correct: Int[Tensor, ""]
    num_targets: int
    penalty: Float[Tensor, ""] | None = None


class LanguageModelLoss(nn.Module):
    """A causal LM with its loss, as one module: what is trained in parallel has to be called as a whole.

    Only positions that have a target reach the head (papers: label smoothing 0.1 through VoxtLM's recipe).

    Args:
        model: a causal LM whose head is linear without a bias, with or without adapters.
        penalty: what is added in training mode.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, penalty: OutlierPenalty | None = None) -> None:
        super().__init__()
        self.model, self.penalty = model, penalty
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        head = base.get_output_embeddings()
        assert isinstance(head, nn.Linear), "the head is no linear layer"
        assert head.bias is None, "the head has a bias"

    def forward(self, batch: Batch, smoothing: float = 0.0) -> BatchLoss:
        """Run the model on a batch and compare position i with the label at i + 1, in float32."""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        watching: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.training and self.penalty is not None:
            watching = self.penalty.watching(batch)
        with watching as parts:
            # [batch length hidden]
            hidden = base.get_decoder()(**batch.model_inputs(), use_cache=False).last_hidden_state
        expected = batch.labels[:, 1:].flatten()
        counts = expected != IGNORE
        objective, nll, correct = linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1)[counts],
            base.get_output_embeddings().weight,
            expected[counts],
            smoothing=smoothing,
        )
        assert int(counts.sum()) == batch.num_targets
        penalty = sum(parts, objective.new_zeros(())) if parts else None
        return BatchLoss(
            objective=objective if penalty is None else objective + penalty,
            nll=nll,
            num_correct=correct,
            num_targets=batch.num_targets,
            penalty=None if penalty is None else penalty.detach(),
        )
