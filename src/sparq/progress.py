"""Progress bars with rate and time left; quiet when standard error is not a terminal."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress(label: str, total: float | None = None, unit: str = "it", **options: Any) -> "tqdm[Any]":
    """Return a bar to `update()` and close (a context manager).

    Args:
        label: what is being done.
        total: how many units there are, if known.
        unit: what is counted; for hours of speech or bytes pass `unit_scale=True` too.
        **options: passed on to tqdm.
    """
    # Of several processes of a launcher the first one shows.
    quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=label, unit=unit, disable=quiet, dynamic_ncols=True, leave=False, **options)
