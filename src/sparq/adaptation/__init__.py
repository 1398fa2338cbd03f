"""Full fine-tuning and low-rank adaptation of a SpeechLM, and the folder that a trained one lives in."""

from sparq.adaptation.lora import add_lora, count_parameters, trainable_parameters
from sparq.adaptation.settings import Base, Initialization, LoraSettings, Preset, lora_preset
from sparq.adaptation.storage import (
    SpeechLM,
    SpeechLMDescription,
    load_speechlm,
    read_description,
    save_speechlm,
)

__all__ = [
    "Base",
    "Initialization",
    "LoraSettings",
    "Preset",
    "SpeechLM",
    "SpeechLMDescription",
    "add_lora",
    "count_parameters",
    "load_speechlm",
    "lora_preset",
    "read_description",
    "save_speechlm",
    "trainable_parameters",
]
