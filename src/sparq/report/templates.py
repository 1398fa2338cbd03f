"""Pages from templates: no scripts, no other files, and all text escaped."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_FOLDER = Path(__file__).parent


def render_template(name: str, **content: Any) -> str:
    """Return a page of this package's templates; `css`, the style of all pages, is there for each."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A percent sign stays on the line of its number.
    environment.filters["keep_percent"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    css = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(name).render(css=css, **content) + "\n"
