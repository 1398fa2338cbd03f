"""Full fine-tuning and LoRA of a SpeechLM, and the folder that a trained one lives in."""

from sparq.adaptation.lora import LoraSettings, add_lora, count_parameters, trainable_parameters
from sparq.adaptation.storage import (
    SpeechLM,
    SpeechLMDescription,
    load_speechlm,
    read_description,
    save_speechlm,
)

__all__ = [
    "LoraSettings",
    "SpeechLM",
    "SpeechLMDescription",
    "add_lora",
    "count_parameters",
    "load_speechlm",
    "read_description",
    "save_speechlm",
    "trainable_parameters",
]
