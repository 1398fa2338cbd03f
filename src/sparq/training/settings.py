"""How to train, as one value."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from sparq.training.optimizer import Schedule
from sparq.training.outlier_penalty import OutlierPenalty
from sparq.training.trackers import Tracker


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train; the defaults are the papers' (appendix E.1 and VoxtLM's recipe).

    Attributes:
        updates: optimizer steps.
        accumulate: micro-batches an update, over all processes.
        learning_rate: peak rate.
        warmup_updates: updates of linear warm-up.
        schedule: what follows the warm-up.
        weight_decay: Adam's L2 term.
        betas: Adam's decay rates.
        clip_norm: bound on the gradient's norm.
        label_smoothing: share of the uniform distribution in the targets.
        checkpoint_updates: updates between two checkpoints.
        validate_updates: updates between two validations; the first and the last update are followed by one, too.
        average_best: the result is the mean of the weights at so many validations, those of highest accuracy.
        patience: validations without a new highest accuracy after which training ends; None never ends it.
        sink_updates: updates over which the sink of `softmax1` or `learned_sink` rises from none; 0 starts with it.
            Nothing is selected before its end: the weights are not of the final attention.
        kurtosis_weight: weight of the kurtosis of the blocks' outputs: `sparq.training.outlier_penalty`.
        max_norm_weight: weight of their largest elements, likewise.
        loggers: experiment trackers that are told every update: `sparq.training.trackers`.
        profile: updates whose operations are timed one by one: `sparq.training.profiling`.
        stop_after: end early after so many updates, with the schedule still as for `updates`.
    """

    updates: int
    accumulate: int = 40
    learning_rate: float = 3e-4
    warmup_updates: int = 2500
    schedule: Schedule = "constant"
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    checkpoint_updates: int = 100
    validate_updates: int = 100
    average_best: int = 1
    patience: int | None = None
    sink_updates: int = 0
    kurtosis_weight: float = 0.0
    max_norm_weight: float = 0.0
    loggers: tuple[Tracker, ...] = ()
    profile: int = 0
    stop_after: int | None = None

    def penalty(self, model: PreTrainedModel | PeftModel) -> OutlierPenalty | None:
        """Return what is added to the loss, None if nothing is."""
        if not (self.kurtosis_weight or self.max_norm_weight):
            return None
        return OutlierPenalty(model, kurtosis=self.kurtosis_weight, max_norm=self.max_norm_weight)

    @property
    def last_update(self) -> int:
        """The number of the last update."""
        return self.updates if self.stop_after is None else min(self.stop_after, self.updates)
