"""Experiment trackers beside the plain log, through Accelerate: TensorBoard, trackio, Weights and Biases."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from accelerate.tracking import get_available_trackers

from sparq.errors import SparqError
from sparq.training.log import Update

Tracker = Literal["tensorboard", "trackio", "wandb"]
"""Trackers by Accelerate's names, which are those of their packages too."""


def check_installed(trackers: Sequence[Tracker]) -> None:
    """Refuse a tracker whose package is missing; Accelerate would leave it out without a word.

    Raises:
        SparqError: there is one.
    """
    available = {str(tracker) for tracker in get_available_trackers()} if trackers else set()
    for tracker in trackers:
        if tracker not in available:
            raise SparqError(f"train.loggers names {tracker}, which is not installed: pip install {tracker}")


def scalars(update: Update) -> dict[str, float]:
    """Return what an update's line holds as named numbers: `loss`, `valid_tasks/asr/accuracy`, `speed/tokens`."""
    numbers: dict[str, float] = {}
    for name, value in dataclasses.asdict(update).items():
        if name == "valid_tasks":
            for task, (nll, accuracy) in (value or {}).items():
                numbers |= {f"valid_tasks/{task}/nll": nll, f"valid_tasks/{task}/accuracy": accuracy}
        elif name == "valid_outliers":
            for task, found in (value or {}).items():
                numbers |= {f"valid_outliers/{task}/{key}": float(v) for key, v in found._asdict().items()}
        elif name == "speed":
            numbers |= {f"speed/{key}": number for key, number in (value or {}).items()}
        elif value is not None and name != "update":
            numbers[name] = float(value)
    return numbers
