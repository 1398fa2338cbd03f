"""Heat maps of one head and of hidden states, frameworks side by side on one color scale."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparq.report.results import FRAMEWORKS, Results, in_order
from sparq.report.svg import inline_svg, printable, style
from sparq.report.traces import AttentionMap

_MOST_LABELS = 24
_COLORMAP = "viridis"


def attention_maps(results: Results) -> Markup | None:
    """Return probability, |value| and |output| of single heads, a row of panels each, None without any.

    The panels of a row share one scale: from 0 to 1 for probabilities, from 0 to a round number for the others.
    Color follows the square root, because most numbers are small.
    """
    maps = results.attention_maps
    if not maps:
        return None
    heads = list(dict.fromkeys((m.layer, m.head) for m in maps))
    names = in_order((m.framework for m in maps), FRAMEWORKS)
    rows = [(head, part) for head in heads for part in _PARTS]
    with style():
        # As high as the square panels of probabilities are wide, and about an inch for the labels under each row.
        height = 0.3 + len(rows) * (min(6.6 / len(names), 4.5) + 1.0)
        figure = Figure(figsize=(9, height), layout="constrained")
        panels = figure.subplots(len(rows), len(names), squeeze=False)
        for (place, part), row in zip(rows, panels, strict=True):
            own = {m.framework: m for m in maps if (m.layer, m.head) == place}
            shown = [own.get(name) for name in names]
            top = _top(part, list(own.values()))
            image = _draw_row(row, shown, part, PowerNorm(0.5, vmin=0, vmax=top))
            row[0].set_ylabel(f"layer {place[0]}, head {place[1]}\n{part.rows}")
            bar = figure.colorbar(image, ax=list(row), shrink=0.9, pad=0.01)
            bar.set_ticks([top * share for share in (0, 0.01, 0.1, 0.25, 0.5, 1)])
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
            bar.set_label(part.title)
            bar.outline.set_visible(False)
        for axes, name in zip(panels[0], names, strict=True):
            axes.set_title(name, loc="left")
        return inline_svg(figure, "attention")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One row of panels: a field of `AttentionMap`, its name, and what its rows and columns are."""

    field: str
    title: str
    rows: str
    columns: str


_PARTS = (
    _Part(field="weights", title="probability", rows="query", columns="key"),
    _Part(field="values", title="|value|", rows="key", columns="channel"),
    _Part(field="outputs", title="|output|", rows="query", columns="channel"),
)


def _top(part: _Part, maps: list[AttentionMap]) -> float:
    """Return the end of a row's scale: the largest number, rounded up to 1, 2 or 5 times a power of ten."""
    if part.field == "weights":
        return 1.0
    finite = [x for m in maps for row in getattr(m, part.field) for x in row if math.isfinite(x)]
    largest = max(finite, default=0.0)
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(unit * step for step in (1, 2, 5, 10) if unit * step >= largest)


def _draw_row(row: Iterable[Axes], maps: list[AttentionMap | None], part: _Part, norm: PowerNorm) -> AxesImage:
    same = len({m.labels for m in maps if m}) == 1
    image: AxesImage | None = None
    for axes, found in zip(row, maps, strict=True):
        axes.grid(visible=False)
        if found is None:
            axes.set_axis_off()
            continue
        numbers = np.ma.masked_invalid(np.array(getattr(found, part.field)))
        image = axes.imshow(numbers, cmap=_COLORMAP, norm=norm, aspect="auto")
        if part.columns == "key":
            _token_ticks(axes, found.labels, x=True)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not same or found is next(m for m in maps if m):
            _token_ticks(axes, found.labels, x=False)
        else:
            axes.set_yticks([])
        axes.set_xlabel(part.columns)
    assert image is not None, "a row stands for a head that some framework has"
    return image


def hidden_maps(results: Results) -> Markup | None:
    """Return the largest absolute layer output by token and layer on one log scale, None without any."""
    maps = results.hidden_maps
    if not maps:
        return None
    values = [value for m in maps for row in m.norms for value in row if 0 < value < math.inf]
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    with style():
        height = 1.1 + 0.14 * min(max(len(m.labels) for m in maps), 40)
        figure = Figure(figsize=(9, max(height, 2.6)), layout="constrained")
        panels = figure.subplots(1, len(maps), squeeze=False)[0]
        same = len({m.labels for m in maps}) == 1
        image: Any = None
        for column, (axes, found) in enumerate(zip(panels, maps, strict=True)):
            axes.grid(visible=False)
            norms = np.array(found.norms)
            # Zero has no logarithm: the lowest color. What is not finite stays empty.
            shown = np.ma.masked_invalid(np.where(norms <= 0, low, norms))
            norm = LogNorm(vmin=low, vmax=high if high > low else low * 10)
            image = axes.imshow(shown, cmap=_COLORMAP, norm=norm, aspect="auto")
            axes.set_title(found.framework, loc="left")
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if column == 0 or not same:
                _token_ticks(axes, found.labels, x=False)
            else:
                axes.set_yticks([])
            if column == 0:
                axes.set_ylabel("token")
        bar = figure.colorbar(image, ax=panels, pad=0.01)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        bar.ax.minorticks_off()
        bar.set_label("largest |activation|")
        bar.outline.set_visible(False)
        return inline_svg(figure, "hidden")


def _token_ticks(axes: Axes, labels: tuple[str, ...], *, x: bool) -> None:
    """Label an axis with tokens, every one or every few of them."""
    step = max(1, math.ceil(len(labels) / _MOST_LABELS))
    places = list(range(0, len(labels), step))
    texts = [printable(labels[place]) for place in places]
    if x:
        axes.set_xticks(places, texts, rotation=90, fontsize=7)
    else:
        axes.set_yticks(places, texts, fontsize=7)
