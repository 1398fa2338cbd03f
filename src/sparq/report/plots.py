"""The figures of a report, in Okabe and Ito's colors; hatches, dashes and markers say the same."""

import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparq.report.numbers import precision_label, show_number
from sparq.report.results import FRAMEWORKS, FULL, Results
from sparq.report.svg import BLUE, INK, PAPER, inline_svg, style
from sparq.report.traces import CurvePoint

_COLORS = ("#D55E00", BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_REPEATED = "repeated in this run"


def learning_curves(results: Results) -> Markup | None:
    """Return losses and largest norms against updates and validation accuracy against epochs, None without a curve.

    The latter is figure 1 of the case study before SpARQ; where a log has no epochs, it is against updates too.

    A repeated slice of a stored training is drawn over it as a wide pale line.
    """
    curves = {name: curve for name, curve in results.curves.items() if curve.points}
    if not curves:
        return None
    places = _places([*results.frameworks, *curves])
    in_epochs = all(point.epochs is not None for curve in curves.values() for point in curve.points)
    with style():
        titles = {
            "loss": ("Training loss", "nats per token"),
            "valid_loss": ("Validation loss", "nats per token"),
            "valid_accuracy": ("Validation accuracy", "next token, %"),
        }
        # Logs of older versions have no norms.
        has_norms = any(point.valid_max_norm is not None for curve in curves.values() for point in curve.points)
        if has_norms:
            titles["valid_max_norm"] = ("Max inf norm of layer outputs", "on the validation set")
        figure = Figure(figsize=(9, 5.8 if has_norms else 3.3), layout="constrained")
        places_of_axes = figure.subplots(2, 2).flat if has_norms else figure.subplots(1, 3)
        panels = dict(zip(titles, places_of_axes, strict=True))
        for field, axes in panels.items():
            axes.set_title(titles[field][0], loc="left")
            axes.set_ylabel(titles[field][1])
            along = "epochs" if field == "valid_accuracy" and in_epochs else "update"
            axes.set_xlabel("epochs" if along == "epochs" else "updates")
            drawn = False
            for name, curve in curves.items():
                index = places[name]
                look = {"color": _COLORS[index], "linestyle": _DASHES[index], "linewidth": 1.6}
                drawn |= _line(axes, curve.points, field, along, label=name, **look)
                if curve.live is not None:
                    look = {"color": _COLORS[index], "linewidth": 6, "alpha": 0.35, "solid_capstyle": "butt"}
                    drawn |= _line(axes, curve.live.points, field, along, label=_REPEATED, **look)
            if not drawn:
                _say_nothing(axes, "not logged")
            elif field == "valid_max_norm":
                ends = [y for line in axes.lines for y in line.get_ydata()]
                _log_scale(axes, low=min(ends), high=max(ends))
        _legend(figure, panels["loss"])
        return inline_svg(figure, "curves")


def outlier_bars(results: Results) -> Markup | None:
    """Return max inf norm and mean kurtosis at full precision on log scales, None without any.

    Where tasks were measured apart there is a group of bars for each of them, as in SpARQ figure 3.
    """
    figures = {r.framework: r.outliers for r in results.ordered_rows() if r.precision == FULL and r.outliers}
    if not figures:
        return None
    places = _places(results.frameworks)
    with style():
        tasks = list(dict.fromkeys(task for found in figures.values() for task in found.by_task))
        # Numbers above the bars need room: side by side only where the bars are few.
        stacked = len(tasks) > 1
        figure = Figure(figsize=(9, 5.2 if stacked else 3), layout="constrained")
        panels = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
        titles = {
            "max_inf_norm": "Max inf norm of layer outputs",
            "mean_kurtosis": "Mean kurtosis of layer outputs (normal: 3)",
        }
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            groups: dict[str, list[float | None]] = {"": [getattr(found, name) for found in figures.values()]}
            if stacked:
                groups = {
                    task: [getattr(found.by_task.get(task), name, None) for found in figures.values()] for task in tasks
                }
            _bars(axes, list(figures), groups, places)
            axes.set_title(title, loc="left")
        if stacked:
            _legend(figure, panels[0])
        return inline_svg(figure, "outliers")


def perplexity_bars(results: Results) -> Markup | None:
    """Return perplexities by precision and framework on log scales, None without any."""
    titles = {
        "textlm_ppl": "TextLM PPL",
        "speechlm_ppl": "SpeechLM PPL",
        "prose_ppl": "Prose PPL, before adaptation",
    }
    present = [name for name in titles if any(getattr(row, name) for row in results.rows)]
    if not present:
        return None
    with style():
        figure = Figure(figsize=(9, 2.4 * len(present) + 0.3), layout="constrained")
        panels = figure.subplots(len(present), 1, squeeze=False)[:, 0]
        for name, axes in zip(present, panels, strict=True):
            values: dict[str, list[float | None]] = {}
            for precision in results.precisions:
                rows = [results.row(framework, precision) for framework in results.frameworks]
                metrics = [getattr(row, name) if row else None for row in rows]
                if any(metrics):
                    values[precision_label(precision)] = [m.value if m else None for m in metrics]
            _bars(axes, results.frameworks, values, _places(results.frameworks))
            axes.set_title(titles[name], loc="left")
        _legend(figure, panels[0])
        return inline_svg(figure, "perplexity")


def layer_norms(results: Results) -> Markup | None:
    """Return max inf norm and kurtosis by layer at full precision, None without per-layer figures."""
    rows = [r for r in results.ordered_rows() if r.precision == FULL and r.outliers and r.outliers.per_layer]
    if not rows:
        return None
    places = _places(results.frameworks)
    with style():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, field, title in zip(
            panels, ("max_inf_norm", "kurtosis"), ("Max inf norm by layer", "Kurtosis by layer"), strict=True
        ):
            for row in rows:
                assert row.outliers is not None
                index = places[row.framework]
                layers = [figures.layer for figures in row.outliers.per_layer]
                values = [getattr(figures, field) for figures in row.outliers.per_layer]
                values = [value if _is_drawable(value) else math.nan for value in values]
                axes.plot(
                    layers,
                    values,
                    color=_COLORS[index],
                    linestyle=_DASHES[index],
                    marker=_MARKERS[index],
                    markersize=3.5,
                    linewidth=1.4,
                    label=row.framework,
                )
            drawn = [y for line in axes.lines for y in line.get_ydata() if math.isfinite(y)]
            if drawn:
                _log_scale(axes, low=min(drawn), high=max(drawn))
            else:
                _say_nothing(axes, "no finite value")
            axes.set_title(title, loc="left")
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, panels[0])
        return inline_svg(figure, "layers")


def _line(axes: Axes, points: Iterable[CurvePoint], field: str, along: str, **look: Any) -> bool:
    logged = [(getattr(p, along), getattr(p, field)) for p in points if getattr(p, field) is not None]
    finite = [(x, value) for x, value in logged if math.isfinite(value)]
    if finite:
        scale = 100 if field == "valid_accuracy" else 1
        axes.plot([x for x, _ in finite], [scale * v for _, v in finite], **look)
    return bool(finite)


def _bars(axes: Axes, frameworks: list[str], groups: dict[str, list[float | None]], places: dict[str, int]) -> None:
    """Draw grouped bars on a log scale with their numbers; a value without a bar is named in its place."""
    finite = [v for values in groups.values() for v in values if v is not None and _is_drawable(v)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 10.0)
    # Bars of a log scale start at a power of ten, so that two pictures of the same numbers look the same.
    floor = 10.0 ** math.floor(math.log10(low / 1.5))
    ceiling, infinite = high * (high / floor) ** 0.3, high * (high / floor) ** 0.14
    width = 0.84 / len(frameworks)
    single = list(groups) == [""]
    for position, framework in enumerate(frameworks):
        index = places[framework]
        for group, values in enumerate(groups.values()):
            x = position if single else group + (position - (len(frameworks) - 1) / 2) * width
            value = values[position]
            # An infinite bar is higher than the highest finite one; a NaN has no bar, only its name.
            height = infinite if value == math.inf else value if _is_drawable(value) else None
            if height is not None:
                axes.bar(
                    x,
                    height - floor,
                    0.6 if single else width * 0.94,
                    bottom=floor,
                    color=_COLORS[index],
                    hatch=_HATCHES[index],
                    edgecolor=PAPER,
                    linewidth=0,
                    label=framework,
                )
            at = floor if height is None else height
            axes.annotate(
                show_number(value),
                (x, at),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    _log_scale(axes, low=floor, high=ceiling)
    axes.set_ylim(floor, ceiling)
    axes.grid(visible=False, axis="x")
    names = frameworks if single else list(groups)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", length=0)


def _log_scale(axes: Axes, *, low: float, high: float) -> None:
    """Set a log scale with ticks at powers of ten, and between them if the range is under two decades."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if 1 <= y < 1e6 else f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _is_drawable(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _say_nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    if _REPEATED in found:
        found.pop(_REPEATED)
        found[_REPEATED] = Line2D([], [], color=INK, linewidth=6, alpha=0.35, solid_capstyle="butt")
    if found:
        columns = min(len(found), 5)
        figure.legend(found.values(), found.keys(), loc="outside upper right", ncols=columns, handlelength=3)


def _places(names: Iterable[str]) -> dict[str, int]:
    """Return each name's place in the lists of colors, dashes and so on, no place twice unless names outnumber them.

    The known frameworks have the same place in every report.
    """
    found = list(dict.fromkeys(names))
    places = {name: FRAMEWORKS.index(name) for name in found if name in FRAMEWORKS}
    free = [*range(len(FRAMEWORKS), len(_COLORS)), *range(len(FRAMEWORKS))]
    free = [place for place in free if place not in places.values()]
    others = [name for name in found if name not in places]
    return places | {name: free[number % len(free)] for number, name in enumerate(others)}
