"""Pretrained causal LMs with outlier-free attention."""

from sparq.models.attention import recording_attention, register_attention, set_attention
from sparq.models.loading import LoadedBackbone, load_backbone
from sparq.models.softmax import ATTENTION_VARIANTS, AttentionVariant, attention_probabilities
from sparq.models.speechlm import build_speechlm

__all__ = [
    "ATTENTION_VARIANTS",
    "AttentionVariant",
    "LoadedBackbone",
    "attention_probabilities",
    "build_speechlm",
    "load_backbone",
    "recording_attention",
    "register_attention",
    "set_attention",
]
