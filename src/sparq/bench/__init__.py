"""Speed, as ratios of things that run in turn in one process."""

from sparq.bench.attention import AttentionCase, Measured, bench_attention, default_cases
from sparq.bench.interleaved import Ratio, interleave

__all__ = ["AttentionCase", "Measured", "Ratio", "bench_attention", "default_cases", "interleave"]
