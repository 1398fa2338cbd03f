"""Memory of this process as Linux counts it; the peak of getrusage also has what the parent held when it forked."""

import re
from pathlib import Path
from typing import Literal


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
