"""Memory of this process as Linux counts it; the peak of getrusage also has what the parent held when it forked."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch


def reset_peak() -> bool:
    """Let the high-water mark start anew; False where that cannot be done: anywhere but on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Return the resident memory, now (`VmRSS`) or at its peak (`VmHWM`); None where nothing tells."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def trim_heap(device: torch.device | None = None) -> bool:
    """Give memory that was freed back to the system; False where that cannot be done: without glibc.

    glibc keeps what lies between blocks still in use, and batches of ever other lengths leave ever more of it.

    Args:
        device: where the arrays of those batches were; nothing is done unless that is the CPU.
    """
    if device is not None and device.type != "cpu":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


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
    # What earlier calls freed stays with the process, where a later one finds it and needs no more.
    if not trim_heap() or not reset_peak():
        return None
    level = resident_bytes("VmRSS")
    run()
    peak = resident_bytes("VmHWM")
    return None if level is None or peak is None else peak - level
