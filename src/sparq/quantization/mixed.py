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
        error_rates: of the float model and of `model` in percent, by name; empty without a budget of points.
        promoted: the parts with more bits, the most sensitive for their size first.
        weight_bytes: bytes of the integer weights of the blocks, and what they would be with no part and with all
            parts promoted.
    """

    model: PreTrainedModel
    scheme: QuantizationScheme
    report: SensitivityReport
    measured: Mapping[str, float]
    error_rates: Mapping[str, tuple[float, float]]
    promoted: tuple[str, ...]
    weight_bytes: tuple[int, int, int]


def quantize_within(
    model: PreTrainedModel,
    calibration: Iterable[CalibrationBatch] | None,
    scheme: QuantizationScheme,
    measure: Measure,
    *,
    budget: float | None = None,
    error_rates: Measure | None = None,
    points: float | None = None,
    better: Mapping[str, Any],
    by: By = "layer",
) -> MixedModel:
    """Quantize with as few parts at more bits as keep perplexities, or error rates, near those in floating point.

    Parts are promoted in the order of their sensitivity by weight: the largest rise of a loss with that part alone
    quantized, divided by the number of its weights. How many, bisection finds, on models put together of layers of the
    one and the other scheme. The result is then quantized as a whole, measured, and given more bits until it keeps to
    the budget: with error compensation, layers depend on those before.

    Args:
        model: a causal LM, left as it was; two copies of it are in memory, at the end three.
        calibration: as for `quantize`.
        scheme: the bits of most layers.
        measure: the losses of a model, which say what is sensitive.
        budget: how much of itself each perplexity may rise, 0.05 for 5 %; None for any.
        error_rates: error rates of a model in percent, for `points`.
        points: by how many each of them may rise, 0.5 for half a point; None for any.
        better: settings of promoted layers, `weight_bits`, `activation_bits` and `activation_clip`.
        by: what is promoted together.

    Raises:
        SparqError: all parts at the better bits miss the budget too; or as `sensitivity`.
    """
    if budget is not None and (not budget > 0 or not math.isfinite(budget)):
        raise SparqError(f"the budget is {budget!r}: it must be a share above 0, for example 0.05")
    if points is not None and (not points >= 0 or not math.isfinite(points)):
        raise SparqError(f"the budget is {points!r} points: it must be 0 or more, for example 0.5")
    if budget is None and points is None:
        raise SparqError("there is no budget: give a share of the perplexity, points of the error rate, or both")
    if (points is None) != (error_rates is None):
        raise SparqError("points of error rates and what measures them go together: give both or neither")
    if scheme.layers:
        raise SparqError("the scheme has layers of their own bits already: start from one without")
    batches = None if calibration is None else list(calibration)
    report = sensitivity(model, batches, scheme, measure, by=by)
    order = sorted(report.parts, key=lambda part: part.worst / part.num_weights, reverse=True)
    judge = _Judge(
        measure=measure, full=report.full, share=budget, error_rates=error_rates,
        rates={} if error_rates is None else dict(error_rates(model)), points=points,
    )  # fmt: skip

    def mixed_scheme(count: int) -> QuantizationScheme:
        promoted = [name for part in order[:count] for name in part.layers]
        return dataclasses.replace(scheme, layers={name: dict(better) for name in promoted})

    low, high = quantize(model, batches, scheme), quantize(model, batches, mixed_scheme(len(order)))
    if missed := judge(high).missed:
        raise SparqError(f"with all layers promoted {missed}")
    fewest, enough = -1, len(order)  # so many miss the budget, so many keep to it
    while enough - fewest > 1:
        count = (fewest + enough) // 2
        with layers_from(high, low, [name for part in order[:count] for name in part.layers]):
            fewest, enough = (count, enough) if judge(low).missed else (fewest, count)
    while True:
        final = mixed_scheme(enough)
        result = quantize(model, batches, final)
        judgement = judge(result)
        if not judgement.missed:
            break
        assert enough < len(order), "all parts promoted are within the budget"
        enough = min(len(order), enough + max(1, len(order) // _STEP))
    least, most = weight_bytes(model, scheme), weight_bytes(model, mixed_scheme(len(order)))
    return MixedModel(
        model=result, scheme=final, report=report, measured=judgement.losses,
        error_rates={key: (rate, judgement.rates[key]) for key, rate in judge.rates.items()},
        weight_bytes=(weight_bytes(model, final), least, most),
        promoted=tuple(part.part for part in order[:enough]),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """What was measured of a model, and what of the budget it misses, if anything."""

    losses: Mapping[str, float]
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    missed: str = ""


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Tells whether a model keeps to a budget; `full` and `rates` are the float model's losses and error rates."""

    measure: Measure
    full: Mapping[str, float]
    share: float | None
    error_rates: Measure | None
    rates: Mapping[str, float]
    points: float | None

    def __call__(self, model: PreTrainedModel) -> _Judgement:
        losses = dict(self.measure(model))
        key, rise = _worst(losses, self.full)
        if self.share is not None and not rise <= math.log1p(self.share):
            missed = f"the perplexity of {key} is {math.expm1(rise):+.1%} of that in floating point"
            return _Judgement(losses=losses, missed=f"{missed}: a budget of {self.share:.1%} needs more bits")
        if self.error_rates is None or self.points is None:
            return _Judgement(losses=losses)
        rates = dict(self.error_rates(model))
        key, rise = _worst(rates, self.rates)
        if rise <= self.points:
            return _Judgement(losses=losses, rates=rates)
        missed = f"the error rate of {key} is {rates[key]:.2f} %, in floating point {self.rates[key]:.2f} %"
        return _Judgement(losses=losses, missed=f"{missed}: a budget of {self.points:g} points needs more bits")


def _worst(found: Mapping[str, float], full: Mapping[str, float]) -> tuple[str, float]:
    """Return what rises most, and by how much."""
    key = max(full, key=lambda key: found[key] - full[key])
    return key, found[key] - full[key]
