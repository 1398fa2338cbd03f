"""Sentences that say what the numbers say: every name and number in them is computed."""

import math

from sparq.report.drop import Drop, drops
from sparq.report.numbers import listed, precision_label, show_change, show_number
from sparq.report.results import FULL, Results, num_bits

_LOST = 80.0
"""A word error rate in percent above which no words are recognized; a model that writes nothing has 100."""


def summarize(results: Results) -> list[str]:
    """Return the sentences that open a report; those whose numbers are missing are absent."""
    found = drops(results)
    sentences = _full_precision(results)
    for precision in _lowest(results):
        sentences += _least_drop(results, found, precision)
        sentences += _least_wer(results, precision)
        sentences += _prose_damage(results, precision)
    return sentences + _outliers(results)


def _lowest(results: Results) -> list[str]:
    quantized = [p for p in results.precisions if p != FULL]
    fewest = min((num_bits(p) for p in quantized), default=0)
    return [p for p in quantized if num_bits(p) == fewest]


def _full_precision(results: Results) -> list[str]:
    rates = []
    for framework in results.frameworks:
        row = results.row(framework, FULL)
        if row and row.asr_wer:
            rates.append(f"{show_number(row.asr_wer.value)} % with {framework}")
    return [f"At full precision the ASR word error rate is {listed(rates)}."] if rates else []


def _least_drop(results: Results, found: dict[str, Drop], precision: str) -> list[str]:
    keys = {f: f"{f}-{precision}" for f in results.frameworks if f"{f}-{precision}" in found}
    percents = {f: p for f, key in keys.items() if (p := found[key].percent) is not None}
    ranked = sorted((f for f in percents if not math.isnan(percents[f])), key=percents.__getitem__)
    shown = [f"{f} {show_change(p)} % ({found[keys[f]].fraction_used})" for f, p in percents.items()]
    if not shown:
        return []
    label = precision_label(precision)
    if len(shown) == 1:
        return [f"At {label} the average performance drop (metrics used) is {shown[0]}."]
    if len({found[keys[f]].used for f in percents}) > 1:
        return [f"At {label} the average drops are over different metrics and do not compare: {listed(shown)}."]
    if not ranked or (len(ranked) > 1 and percents[ranked[0]] == percents[ranked[1]]):
        return [f"At {label} no framework alone loses least; average drop (metrics used): {listed(shown)}."]
    best, rest = ranked[0], ranked[1:] + [f for f in percents if f not in ranked]
    others = [f"{show_change(percents[f])} % for {f}" for f in rest]
    return [
        f"At {label}, {best} loses least against its own full precision: {show_change(percents[best])} % "
        f"on average over {found[keys[best]].fraction_used} metrics, against {listed(others)}."
    ]


def _least_wer(results: Results, precision: str) -> list[str]:
    rates: dict[str, float] = {}
    for framework in results.frameworks:
        row = results.row(framework, precision)
        if row and row.asr_wer and not math.isnan(row.asr_wer.value):
            rates[framework] = row.asr_wer.value
    if len(rates) < 2:
        return []
    best = min(rates, key=rates.__getitem__)
    if rates[best] > _LOST:
        every = listed([f"{show_number(rate)} % WER with {f}" for f, rate in rates.items()])
        return [f"At {precision_label(precision)} speech is not recognized any more: {every}."]
    others = [f"{f} {show_number(rate)} %" for f, rate in rates.items() if f != best]
    if list(rates.values()).count(rates[best]) > 1:
        return []
    return [
        f"In absolute terms at {precision_label(precision)}, {best} recognizes speech best: "
        f"{show_number(rates[best])} % WER ({listed(others)})."
    ]


def _prose_damage(results: Results, precision: str) -> list[str]:
    parts = []
    for framework in results.frameworks:
        full, low = results.row(framework, FULL), results.row(framework, precision)
        if not (full and low and full.prose_ppl and low.prose_ppl):
            continue
        before, after = full.prose_ppl.value, low.prose_ppl.value
        factor = f" ({show_number(after / before)} times)" if before and math.isfinite(after) else ""
        parts.append(f"{framework} from {show_number(before)} to {show_number(after)}{factor}")
    if not parts:
        return []
    label = precision_label(precision)
    return [f"The pretrained backbone's prose perplexity goes, at {label}, for {'; for '.join(parts)}."]


def _outliers(results: Results) -> list[str]:
    norms: dict[str, float] = {}
    for framework in results.frameworks:
        row = results.row(framework, FULL)
        if row and row.outliers:
            # The figures over all layers are of text and of speech with its text; units alone may stick out further.
            by_task = row.outliers.by_task.values()
            norms[framework] = max([row.outliers.max_inf_norm, *(task.max_inf_norm for task in by_task)])
    if not norms:
        return []
    shown = listed([f"{show_number(norm)} with {framework}" for framework, norm in norms.items()])
    sentence = f"The largest activation at full precision is {shown}"
    smallest, largest = (pick(norms, key=norms.__getitem__) for pick in (min, max))
    if 0 < norms[smallest] < norms[largest] < math.inf:
        factor = show_number(norms[largest] / norms[smallest])
        sentence += f": {factor} times less with {smallest} than with {largest}"
    return [sentence + "."]
