"""Attention and hidden-state heat maps, frameworks side by side on one color scale."""

import math
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparq.report.results import FRAMEWORKS, Results, in_order
from sparq.report.svg import inline_svg, printable, style

_MOST_LABELS = 24
_COLORMAP = "viridis"


def attention_maps(results: Results) -> Markup | None:
    """Return attention probabilities, a row of panels per layer and head, None without any.

    All panels share one scale from 0 to 1. Color follows the square root, because most probabilities are
    small.
    """
    maps = results.attention_maps
    if not maps:
        return None
    heads = list(dict.fromkeys((m.layer, m.head) for m in maps))
    names = in_order((m.framework for m in maps), FRAMEWORKS)
    with style():
        # Square panels: as high as wide, and about an inch for the labels under each row.
        height = 0.3 + len(heads) * (min(6.6 / len(names), 4.5) + 1.4)
        figure = Figure(figsize=(9, height), layout="constrained")
        panels = figure.subplots(len(heads), len(names), squeeze=False)
        same = len({m.labels for m in maps}) == 1
        image: Any = None
        for row, (layer, head) in enumerate(heads):
            for column, name in enumerate(names):
                axes = panels[row, column]
                axes.grid(visible=False)
                found = next((m for m in maps if (m.framework, m.layer, m.head) == (name, layer, head)), None)
                if row == 0:
                    axes.set_title(name, loc="left")
                if found is None:
                    axes.set_axis_off()
                    continue
                weights = np.array(found.weights)
                image = axes.imshow(weights, cmap=_COLORMAP, norm=PowerNorm(0.5, vmin=0, vmax=1))
                _token_ticks(axes, found.labels, x=True)
                if weights.shape[0] != weights.shape[1]:
                    axes.yaxis.get_major_locator().set_params(integer=True)
                elif column == 0 or not same:
                    _token_ticks(axes, found.labels, x=False)
                else:
                    axes.set_yticks([])
                axes.set_xlabel("key")
                if column == 0:
                    axes.set_ylabel(f"layer {layer}, head {head}\nquery")
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        bar.set_label("probability")
        bar.outline.set_visible(False)
        return inline_svg(figure, "attention")


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
