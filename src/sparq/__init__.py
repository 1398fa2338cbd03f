"""Turn a pretrained text LLM into an outlier-free SpeechLM that survives low-bit quantization.

The names below are those of the everyday use; they are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparq.attention import AttentionSpec, SinkSchedule
    from sparq.evaluation import find_massive_activations, measure_outliers
    from sparq.models import convert, load_model
    from sparq.quantization import load_quantized, quantize, save_quantized, to_integers

__all__ = [
    "AttentionSpec",
    "SinkSchedule",
    "convert",
    "find_massive_activations",
    "load_model",
    "load_quantized",
    "measure_outliers",
    "quantize",
    "save_quantized",
    "to_integers",
]

_HOMES = {
    "AttentionSpec": "attention",
    "SinkSchedule": "attention",
    "convert": "models",
    "find_massive_activations": "evaluation",
    "load_model": "models",
    "load_quantized": "quantization",
    "measure_outliers": "evaluation",
    "quantize": "quantization",
    "save_quantized": "quantization",
    "to_integers": "quantization",
}


def __getattr__(name: str) -> Any:
    # `sparq --help` and the checks of arguments must not wait seconds for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'sparq' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sparq.{_HOMES[name]}"), name)
