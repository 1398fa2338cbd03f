"""Peak memory of a call, beyond what was there before it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how far memory rose above its level at the start of a call, or None where nothing can tell.

    CUDA counts what its allocator handed out; Linux the resident pages of the process, which is coarser.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What earlier calls freed stays with the process, where a later one finds it and needs no more.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None
    before = _kib("VmRSS")
    run()
    return 1024 * (_kib("VmHWM") - before)


def _kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux says so in kB"
    return int(found[1])
