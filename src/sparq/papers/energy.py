"""The energy that a processor has used, where Linux tells it."""

from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


def read_joules(folder: Path = _POWERCAP) -> float | None:
    """Return what the processor packages have used since some time, in joules; None where it cannot be read.

    The counters (RAPL) are of whole packages: of everything that the machine does. They start over at some value, so a
    difference may be negative. Most systems let only root read them.
    """
    try:
        packages = [path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1]
        counters = [int((path / "energy_uj").read_text(encoding="ascii")) for path in packages]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None
