"""The log of a training: one line of JSON an update."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sparq.training.outlier_watch import ValidOutliers


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast an update was.

    Attributes:
        tokens: tokens a second, padding left out.
        speech: seconds of speech a second; speech in sequences of text alone there is none.
        mfu: operations that the update's products need (`sparq.training.flops`) by those that this machine does in the
            same time when it multiplies large square matrices of the model's type.
    """

    tokens: float
    speech: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """One line of the log: one update, its losses in nats per target token.

    Attributes:
        update: its number, from 1.
        tokens: tokens so far.
        seconds: time so far.
        loss: what is minimized: smoothed cross-entropy, and the penalty if there is one.
        nll: plain negative log-likelihood.
        learning_rate: its rate.
        gradient_norm: before clipping.
        penalty: on outliers, part of `loss`.
        epochs: how often the training split has been gone through by then, if the stream tells.
        valid_nll: of the validation set, if it was validated.
        valid_accuracy: share of validation targets that had the largest logit.
        valid_tasks: the two for each task by itself.
        valid_outliers: those of the blocks' outputs on each task.
        speed: how fast it was.
    """

    update: int
    tokens: int
    seconds: float
    loss: float
    nll: float
    learning_rate: float
    gradient_norm: float
    penalty: float | None = None
    epochs: float | None = None
    valid_nll: float | None = None
    valid_accuracy: float | None = None
    valid_tasks: dict[str, tuple[float, float]] | None = None
    valid_outliers: dict[str, ValidOutliers] | None = None
    speed: Speed | None = None

    def to_line(self) -> str:
        """Return its line."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def read_log(file: Path) -> list[Update]:
    """Read a training log; a last line that a kill cut short is left out."""
    updates = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            break
        if content.get("valid_tasks") is not None:
            content["valid_tasks"] = {task: tuple(pair) for task, pair in content["valid_tasks"].items()}
        if content.get("valid_outliers") is not None:
            content["valid_outliers"] = {task: ValidOutliers(*v) for task, v in content["valid_outliers"].items()}
        if content.get("speed") is not None:
            content["speed"] = Speed(**content["speed"])
        updates.append(Update(**content))
    return updates
