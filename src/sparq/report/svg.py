"""Figures as inline SVG: text stays text, colors follow the page, identifiers are unique on it."""

import contextlib
import io
import re
from functools import cache

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from sparq.tokens.special import FIRST_UNIT, MAX_UNITS

INK = "#010203"
"""Drawn as the page's text color."""

GRID = "#010204"
"""Drawn as the page's line color."""

PAPER = "#010205"
"""Drawn as the page's background."""

BLUE = "#0072B2"
"""Okabe and Ito's blue, which a dark page replaces by a lighter one."""

_ROLES = {BLUE: "var(--blue)", INK: "currentColor", GRID: "var(--line)", PAPER: "var(--paper)"}
_ON_WHITE = {BLUE: BLUE, INK: "#1a1a1a", GRID: "#bbbbbb", PAPER: "#ffffff"}
_FONT = "DejaVu Sans"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparq",
    "font.family": _FONT,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 1.2,
    "image.interpolation": "nearest",
    "text.parse_math": False,
}


def style() -> contextlib.AbstractContextManager[None]:
    """Return a context manager under which figures are made and drawn; it restores matplotlib's settings."""
    return mpl.rc_context(_STYLE)


def inline_svg(figure: Figure, name: str) -> Markup:
    """Return a figure as an `<svg>` element to put into HTML; call it inside of `style()`.

    Args:
        figure: what to draw.
        name: prefix of every id in the element; one that no other figure of the page has.
    """
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # An image is named after its pixels, so two equal ones would have one id; nothing refers to it.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\g<1>", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, role in _ROLES.items():
        text = text.replace(color.lower(), role)
    return Markup(text.replace(f"'{_FONT}'", f"'{_FONT}', system-ui, sans-serif"))


def svg_file(element: Markup) -> str:
    """Return a figure of `inline_svg` as the text of a file, in dark ink on white."""
    text = str(element)
    for color, role in _ROLES.items():
        text = text.replace(role, _ON_WHITE[color])
    head, rest = text.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


def printable(label: str, *, limit: int = 14) -> str:
    """Return a token as a figure can print it: at most `limit` characters, each with a glyph in the font.

    Speech units become `u17`, spaces and word marks `␣`, what the font lacks `□`.
    """
    shown = "".join(_printable(character) for character in label)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _printable(character: str) -> str:
    if 0 <= ord(character) - FIRST_UNIT < MAX_UNITS:
        return f"u{ord(character) - FIRST_UNIT}"
    if character in " Ġ▁":
        return "␣"
    return character if character.isprintable() and ord(character) in _glyphs() else "□"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())
