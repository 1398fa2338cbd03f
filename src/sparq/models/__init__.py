"""Pretrained causal LMs with outlier-free attention."""

from sparq.models.conversion import convert, converted_layers, recording_attention, saved_attention
from sparq.models.loading import LoadedBackbone, load_backbone, load_model
from sparq.models.speechlm import build_speechlm

__all__ = [
    "LoadedBackbone",
    "build_speechlm",
    "convert",
    "converted_layers",
    "load_backbone",
    "load_model",
    "recording_attention",
    "saved_attention",
]
