"""Peak memory of a call, beyond what was there before it."""

import ctypes
from collections.abc import Callable

import torch

from sparq.process_memory import reset_peak, resident_bytes


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
    except (OSError, AttributeError):  # no glibc
        return None
    if not reset_peak():
        return None
    level = resident_bytes("VmRSS")
    run()
    peak = resident_bytes("VmHWM")
    return None if level is None or peak is None else peak - level
