"""Speed, as ratios of things that run in turn in one process."""

from sparq.bench.attention import PASSES, AttentionCase, Measured, bench_attention, default_cases
from sparq.bench.interleaved import Ratio, interleave
from sparq.bench.quantization import QuantizationSpeed, bench_quantization, scheme_named, weight_bytes
from sparq.bench.training import CASES, TrainingSpeed, bench_training

__all__ = [
    "CASES",
    "PASSES",
    "AttentionCase",
    "Measured",
    "QuantizationSpeed",
    "Ratio",
    "TrainingSpeed",
    "bench_attention",
    "bench_quantization",
    "bench_training",
    "default_cases",
    "interleave",
    "scheme_named",
    "weight_bytes",
]
