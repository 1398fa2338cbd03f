"""Where numbers come from: code version, packages, machine."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from sparq.report.results import Provenance

PACKAGES = ("sparq", "torch", "transformers", "peft", "numpy", "sentencepiece")


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect_provenance(command: tuple[str, ...] | None = None) -> Provenance:
    """Return what runs here and now.

    Args:
        command: the command line to record; this process's by default.
    """
    git_hash, git_dirty = source_version(Path(__file__))
    return Provenance(
        git_hash=git_hash,
        git_dirty=git_dirty,
        packages={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        platform=platform.platform(),
        cpu=_cpu_model(),
        num_cpus=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        command=(Path(sys.argv[0]).name, *sys.argv[1:]) if command is None else command,
    )


def source_version(file: Path) -> tuple[str, bool | None]:
    """Return the commit that holds `file` and whether tracked files differ from it, or ("unknown", None).

    A copy inside someone else's repository, e.g. in a virtual environment, is not tracked there: that
    repository's commit says nothing about it and is not reported.
    """
    folder = str(file.resolve().parent)
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return "unknown", None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return "unknown", None
    return commit, bool(changes)


def _git(folder: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"
