"""Post-training quantization of causal LMs: simulated with exact integer semantics, or computed with integers."""

from sparq.quantization.export import export_compressed_tensors
from sparq.quantization.integers import to_integers
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.mixed import MixedModel, quantize_within
from sparq.quantization.quantize import quantize, scheme_of
from sparq.quantization.scheme import QuantizationScheme
from sparq.quantization.sensitivity import PartSensitivity, SensitivityReport, sensitivity
from sparq.quantization.storage import load_quantized, save_quantized

__all__ = [
    "MixedModel",
    "PartSensitivity",
    "QuantizationScheme",
    "QuantizedLinear",
    "SensitivityReport",
    "export_compressed_tensors",
    "load_quantized",
    "quantize",
    "quantize_within",
    "save_quantized",
    "scheme_of",
    "sensitivity",
    "to_integers",
]
