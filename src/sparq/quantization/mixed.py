"""More bits for the layers that need them most, until a model is as good as asked for."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.quantize import quantize
from sparq.quantization.scheme import QuantizationScheme
from sparq.quantization.sensitivity import By, Measure, SensitivityReport, layers_from, sensitivity, weight_bytes

_STEP = 20
"""If the model that was quantized anew misses the budget, one part in so many more is promoted."""


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """A model of mixed bits that keeps to a budget, as measured.

    Attributes:
        model: quantized by `scheme`.
        scheme: the bits of each promoted layer are in its `layers`.
        report: the sensitivity that decided the order of promotion.
        measured: losses of `model`.
        promoted: the parts with more bits, the most sensitive for their size first.
        weight_bytes: bytes of the integer weights of the blocks, and what they would be with no part and with all
            parts promoted.
    """

    model: PreTrainedModel
    scheme: QuantizationScheme
    report: SensitivityReport
    measured: Mapping[str, float]
    promoted: tuple[str, ...]
    weight_bytes: tuple[int, int, int]


def quantize_within(
    model: PreTrainedModel,
    calibration: Iterable[CalibrationBatch] | None,
    scheme: QuantizationScheme,
    measure: Measure,
    *,
    budget: float,
    better: Mapping[str, Any],
    by: By = "layer",
) -> MixedModel:
    """Quantize with as few parts at more bits as keep every perplexity within a share of that in floating point.

    Parts are promoted in the order of their sensitivity by weight: the largest rise of a loss with that part alone
    quantized, divided by the number of its weights. How many, bisection finds, on models put together of layers of the
    one and the other scheme. The result is then quantized as a whole, measured, and given more bits until it keeps to
    the budget: with error compensation, layers depend on those before.

    Args:
        model: a causal LM, left as it was; two copies of it are in memory, at the end three.
        calibration: as for `quantize`.
        scheme: the bits of most layers.
        measure: the losses of a model.
        budget: how much of itself each perplexity may rise, 0.05 for 5 %.
        better: settings of promoted layers, `weight_bits`, `activation_bits` and `activation_clip`.
        by: what is promoted together.

    Raises:
        SparqError: all parts at the better bits miss the budget too; or as `sensitivity`.
    """
    if not budget > 0 or not math.isfinite(budget):
        raise SparqError(f"the budget is {budget!r}: it must be a share above 0, for example 0.05")
    if scheme.layers:
        raise SparqError("the scheme has layers of their own bits already: start from one without")
    batches = None if calibration is None else list(calibration)
    report = sensitivity(model, batches, scheme, measure, by=by)
    order = sorted(report.parts, key=lambda part: part.worst / part.num_weights, reverse=True)

    def mixed_scheme(count: int) -> QuantizationScheme:
        promoted = [name for part in order[:count] for name in part.layers]
        return dataclasses.replace(scheme, layers={name: dict(better) for name in promoted})

    def within(found: Mapping[str, float]) -> bool:
        return all(found[key] - report.full[key] <= math.log1p(budget) for key in report.full)

    low, high = quantize(model, batches, scheme), quantize(model, batches, mixed_scheme(len(order)))
    reached = measure(high)
    if not within(reached):
        key = max(report.full, key=lambda key: reached[key] - report.full[key])
        raise SparqError(
            f"with all layers promoted the perplexity of {key} is {math.expm1(reached[key] - report.full[key]):+.1%} of"
            f" that in floating point: a budget of {budget:.1%} needs more bits"
        )
    fewest, enough = -1, len(order)  # so many miss the budget, so many keep to it
    while enough - fewest > 1:
        count = (fewest + enough) // 2
        with layers_from(high, low, [name for part in order[:count] for name in part.layers]):
            fewest, enough = (fewest, count) if within(measure(low)) else (count, enough)
    while True:
        final = mixed_scheme(enough)
        result = quantize(model, batches, final)
        measured = dict(measure(result))
        if within(measured):
            break
        assert enough < len(order), "all parts promoted are within the budget"
        enough = min(len(order), enough + max(1, len(order) // _STEP))
    least, most = weight_bytes(model, scheme), weight_bytes(model, mixed_scheme(len(order)))
    return MixedModel(
        model=result, scheme=final, report=report, measured=measured,
        weight_bytes=(weight_bytes(model, final), least, most),
        promoted=tuple(part.part for part in order[:enough]),
    )  # fmt: skip
