"""Speed, as ratios of things that run in turn in one process."""

from sparq.bench.attention import PASSES, AttentionCase, Measured, bench_attention, default_cases
from sparq.bench.interleaved import Ratio, interleave

__all__ = ["PASSES", "AttentionCase", "Measured", "Ratio", "bench_attention", "default_cases", "interleave"]
