"""The time of every operation of a few updates, by PyTorch's profiler."""

from pathlib import Path

import torch
from torch.profiler import profile

from sparq.files import write_text

SKIPPED = 2
"""Updates before the first that counts: they allocate and choose kernels."""

_ROWS = 40


class UpdateProfile:
    """Watches some updates of a session and writes their table.

    Args:
        updates: how many.
        file: where the table goes.
    """

    def __init__(self, updates: int, file: Path) -> None:
        self.updates, self.file = updates, file
        self._seen = 0
        self._profiler: profile | None = None

    def before(self) -> None:
        """Begin to watch, when it is time to."""
        if self._seen == SKIPPED:
            self._profiler = profile()
            self._profiler.start()
        self._seen += 1

    def after(self) -> None:
        """Write the table when all have been seen."""
        if self._profiler is not None and self._seen == SKIPPED + self.updates:
            self._profiler.stop()
            times = self._profiler.key_averages()
            order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            write_text(self.file, f"{self.updates} updates\n{times.table(sort_by=order, row_limit=_ROWS)}")
            self._profiler = None
