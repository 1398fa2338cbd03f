"""The average performance drop: how much worse a quantized model is than itself at full precision."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparq.report.results import FULL, ErrorRate, Perplexity, Results, Row


@dataclass(frozen=True, kw_only=True)
class Drop:
    """The mean relative increase in percent, None if no metric could be used.

    Attributes:
        percent: the mean over `used`; infinite or NaN where a metric of the row is.
        used: metrics in the mean.
        left_out: metrics not in the mean, each with the reason.
    """

    percent: float | None
    used: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def fraction_used(self) -> str:
        """E.g. `3/4`."""
        return f"{len(self.used)}/{len(self.used) + len(self.left_out)}"


def metrics(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the four metrics of the mean, one for each task; lower is better for each.

    TTS counts by what a recognizer hears, or where no speech was made, by the error rate of units.
    """
    return metric_names(heard=any(row.tts_cer is not None for row in rows))


def metric_names(*, heard: bool) -> tuple[str, ...]:
    """Return the four metrics of the mean with or without a recognizer for TTS."""
    return ("textlm_ppl", "speechlm_ppl", "asr_wer", "tts_cer" if heard else "tts_uer")


def average_drop(values: Mapping[str, float | None], base: Mapping[str, float | None]) -> Drop:
    """Return 100 / n * sum over metrics m of (values[m] - base[m]) / base[m] (SpARQ section 4 and table 1).

    A metric is left out, and named, if either side lacks it or if the base is zero or not finite. A NaN or an
    infinity in `values` stays in the mean: a model that broke must not look better than one that did not.

    Args:
        values: metrics of the quantized row, None where not measured.
        base: the same metrics of the same framework at full precision.
    """
    increases: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys((*base, *values)):
        value, reference = values.get(name), base.get(name)
        if value is None:
            left_out[name] = "not measured"
        elif reference is None:
            left_out[name] = "not measured at full precision"
        elif reference == 0 or not math.isfinite(reference):
            left_out[name] = f"{reference:g} at full precision"
        else:
            increases[name] = (value - reference) / reference
    percent = 100 * sum(increases.values()) / len(increases) if increases else None
    return Drop(percent=percent, used=tuple(increases), left_out=left_out)


def row_drop(row: Row, base: Row, names: Sequence[str] | None = None) -> Drop:
    """Return the drop of a row; a metric that was counted over other data than its base is left out too.

    Args:
        row: the quantized row.
        base: the same framework's row at full precision.
        names: of the metrics; those of these two rows by default.
    """
    names = metrics((row, base)) if names is None else names
    values: dict[str, float | None] = {}
    other_data: list[str] = []
    for name in names:
        metric, reference = _metric(row, name), _metric(base, name)
        values[name] = None if metric is None else metric.value
        if metric is not None and reference is not None and _data(metric) != _data(reference):
            values[name] = None
            other_data.append(name)
    drop = average_drop(values, {name: _value(base, name) for name in names})
    reasons = dict.fromkeys(other_data, "counted over other data than at full precision")
    return Drop(percent=drop.percent, used=drop.used, left_out={**drop.left_out, **reasons})


def drops(results: Results) -> dict[str, Drop]:
    """Return the drop of each quantized row by its key, where its framework has a full-precision row."""
    found: dict[str, Drop] = {}
    names = metrics(results.rows)
    for row in results.ordered_rows():
        base = results.row(row.framework, FULL)
        if base is not None and row.precision != FULL:
            found[row.key] = row_drop(row, base, names)
    return found


def _metric(row: Row, name: str) -> Perplexity | ErrorRate | None:
    metric = getattr(row, name)
    assert metric is None or isinstance(metric, Perplexity | ErrorRate)
    return metric


def _value(row: Row, name: str) -> float | None:
    metric = _metric(row, name)
    return None if metric is None else metric.value


def _data(metric: Perplexity | ErrorRate) -> tuple[str, int, int]:
    denominator = metric.tokens if isinstance(metric, Perplexity) else metric.length
    return metric.split, metric.utterances, denominator
