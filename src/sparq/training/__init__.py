"""Training of a SpeechLM."""

from sparq.training.log import Update, read_log
from sparq.training.loop import TrainingRun
from sparq.training.loss import LanguageModelLoss
from sparq.training.settings import TrainingSettings

__all__ = ["LanguageModelLoss", "TrainingRun", "TrainingSettings", "Update", "read_log"]
