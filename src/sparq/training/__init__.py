"""Training of a SpeechLM."""

from sparq.training.loop import TrainingRun, TrainingSettings, Update, read_log, validate
from sparq.training.loss import batch_loss, target_loss

__all__ = ["TrainingRun", "TrainingSettings", "Update", "batch_loss", "read_log", "target_loss", "validate"]
