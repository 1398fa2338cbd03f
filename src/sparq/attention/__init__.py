"""Attention that can do nothing: its variants, how they are computed, and their place in transformers."""

from sparq.attention.functions import IMPLEMENTATION, register_attention
from sparq.attention.inner_quantizer import InnerQuantizer
from sparq.attention.module import CHILD, OutlierFreeAttention
from sparq.attention.probabilities import attention_probabilities
from sparq.attention.reference import reference_attention
from sparq.attention.schedule import SCHEDULED, SinkSchedule
from sparq.attention.spec import ATTENTION_NAMES, NORMALIZATIONS, AttentionSpec, Clip, Gate

__all__ = [
    "ATTENTION_NAMES",
    "CHILD",
    "IMPLEMENTATION",
    "NORMALIZATIONS",
    "SCHEDULED",
    "AttentionSpec",
    "Clip",
    "Gate",
    "InnerQuantizer",
    "OutlierFreeAttention",
    "SinkSchedule",
    "attention_probabilities",
    "reference_attention",
    "register_attention",
]
