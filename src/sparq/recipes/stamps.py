"""Stamps: a small JSON file for each step that says what it was made from and what it made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparq.configuration import from_mapping, to_mapping
from sparq.files import fingerprint, read_json, sha256_file, write_json

STAMP_FORMAT = 1
"""Part of every key: a change of the layout makes older run folders stale instead of misread."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A file that a step made.

    Attributes:
        path: relative to the run folder, with forward slashes.
        size: bytes.
        sha256: of the content.
        modified_ns: time of the last change; if it and the size still hold, the content is not read again.
    """

    path: str
    size: int
    sha256: str
    modified_ns: int


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """The state of a step in a run folder.

    Attributes:
        state: `started` while the step runs or after it was cut off, `done`, or `discarded` while its files
            are being removed.
        key: fingerprint of the settings, the keys of the steps before, and the formats.
        settings: the settings that it used, to say later which one differs.
        inputs: for each step that it needs, the digest of what that step made.
        outputs: what it made; empty until it is done.
        attempts: how often it was started for this key; above 1, `seconds` is of the last part only.
        seconds: wall time of the attempt that finished.
        peak_memory_bytes: largest resident memory in that attempt.
        finished: when it finished, ISO 8601 in UTC.
    """

    state: Literal["started", "done", "discarded"]
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[Output, ...] = ()
    attempts: int = 1
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    finished: str | None = None
    format: int = field(default=STAMP_FORMAT)

    @property
    def digest(self) -> str:
        """Name of what the step made: the same files give the same digest."""
        return fingerprint([(output.path, output.sha256) for output in self.outputs])


def read_stamp(path: Path) -> Stamp | None:
    """Read a stamp, or return None if there is none.

    Raises:
        SparqError: the file is damaged.
    """
    return from_mapping(Stamp, read_json(path), where=str(path)) if path.exists() else None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write a stamp atomically."""
    write_json(path, to_mapping(stamp))


def describe_outputs(root: Path, paths: Iterable[Path]) -> tuple[Output, ...]:
    """Hash files, and all files in folders, below `root`.

    Args:
        root: the run folder.
        paths: files or folders in it.
    """
    files: set[Path] = set()
    for path in paths:
        assert path.is_relative_to(root), f"{path} is outside of {root}"
        assert path.exists(), f"a step says that it made {path}, which is not there"
        files.update(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else files.add(path)
    return tuple(
        Output(
            path=file.relative_to(root).as_posix(),
            size=file.stat().st_size,
            sha256=sha256_file(file),
            modified_ns=file.stat().st_mtime_ns,
        )
        for file in sorted(files)
    )


def audit(root: Path, outputs: Iterable[Output]) -> tuple[list[str], list[str]]:
    """Return the outputs that are missing and those whose content has changed since."""
    missing, changed = [], []
    for output in outputs:
        file = root / output.path
        if not file.is_file():
            missing.append(output.path)
            continue
        status = file.stat()
        if (status.st_size, status.st_mtime_ns) == (output.size, output.modified_ns):
            continue
        # A copied run folder has new times and the same content.
        if status.st_size != output.size or sha256_file(file) != output.sha256:
            changed.append(output.path)
    return missing, changed


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say which settings differ: `units.k was 200, is 100`."""
    result = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if before == after and (key in old) == (key in new):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and path != "files":
            result += changes(before, after, f"{path}.")
        elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            result += changes(_numbered(before), _numbered(after), f"{path}.")
        elif path == "files":
            result += _file_changes(before or {}, after or {})
        else:
            result.append(f"{path} was {_show(before, key in old)}, is {_show(after, key in new)}")
    return result


def _file_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    # Files that were only added or taken away show as a changed path among the other settings.
    return [f"{path} has other content now" for path, digest in new.items() if old.get(path, digest) != digest]


def _numbered(values: list[Any]) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}


def _show(value: Any, given: bool) -> str:
    if not given:
        return "absent"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
