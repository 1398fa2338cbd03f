"""Texts that stand for the figures: what each shows, with its main numbers."""

from sparq.report.numbers import listed, precision_label, show_number
from sparq.report.results import FULL, Outliers, Results, TaskOutliers


def alternatives(results: Results) -> dict[str, str]:
    """Return the alternative text of each figure that the page may hold."""
    return {
        "perplexity": "Bars of perplexity by precision and framework; the tables hold the numbers. "
        + _perplexities(results),
        "outlier_bars": "Bars of max inf norm and mean kurtosis at full precision: " + _outliers(results),
        "layer_norms": "Lines of max inf norm and kurtosis over decoder layers, one for each framework.",
        "hidden_maps": "Heat maps of the largest absolute activation by token and layer for "
        + _names([m.framework for m in results.hidden_maps]),
        "attention_maps": "Heat maps of attention probabilities, values and outputs for "
        + _names([f"{m.framework} layer {m.layer} head {m.head}" for m in results.attention_maps]),
        "curves": "Lines of training loss, validation loss and accuracy by update. " + _curves(results),
    }


def _names(names: list[str]) -> str:
    return listed(list(dict.fromkeys(names))) + "." if names else "no model."


def _perplexities(results: Results) -> str:
    parts = [
        f"{row.framework} {precision_label(row.precision)} {show_number(row.textlm_ppl.value)}"
        for row in results.ordered_rows()
        if row.textlm_ppl
    ]
    return f"TextLM: {', '.join(parts)}." if parts else ""


def _outliers(results: Results) -> str:
    parts = []
    for row in results.ordered_rows():
        if row.outliers is None or row.precision != FULL:
            continue
        shown: list[tuple[str, Outliers | TaskOutliers]] = [(row.framework, row.outliers)]
        shown += [(f"{row.framework} {task}", own) for task, own in row.outliers.by_task.items()]
        parts += [f"{name} {show_number(own.max_inf_norm)} and {show_number(own.mean_kurtosis)}" for name, own in shown]
    return "; ".join(parts) + "."


def _curves(results: Results) -> str:
    parts = [
        f"{name} ends at update {curve.points[-1].update:,} with loss {show_number(curve.points[-1].loss)}"
        for name, curve in results.curves.items()
        if curve.points
    ]
    return "; ".join(parts) + "." if parts else ""
