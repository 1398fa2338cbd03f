"""Files that are either whole or absent: atomic writes, hashes and JSON; and a database that goes with its user."""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparq.errors import SparqError

_PARTIAL = re.compile(r"\..*\.\d+\.partial(\..*)?", re.DOTALL)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, else removed.

    The temporary name keeps the suffix, because some writers choose the format by it. It may become a file or a
    folder; a folder replaces an older folder of that name.

    Raises:
        SparqError: the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.parent / f".{path.stem}.{os.getpid()}.partial{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.is_dir():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".old.") as old:
                path.rename(Path(old) / path.name)
                temporary.rename(path)
        else:
            temporary.replace(path)
    except Exception as error:
        if _is_full(error):
            raise SparqError(
                f"no space left on the disk for {path}: free some and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise SparqError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from error
        raise
    finally:
        remove(temporary)


def _is_full(error: Exception) -> bool:
    # safetensors writes in Rust and wraps the operating system's error into one of its own, with its words only.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _sync(path: Path) -> None:
    targets = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for target in targets:
        with target.open("rb") as file:
            os.fsync(file.fileno())


def sweep(folder: Path) -> None:
    """Clear what killed processes left of `atomic_path` in a folder and below: half-written and half-replaced files.

    Only for a folder that no other process writes.
    """
    for root, names, files in os.walk(folder, topdown=True):
        for name in [*names, *files]:
            path = Path(root) / name
            if name.startswith(".old.") and path.is_dir():
                # `atomic_path` was cut off between its two renames: the older folder is the whole one.
                for child in path.iterdir():
                    if not (path.parent / child.name).exists():
                        child.rename(path.parent / child.name)
                remove(path)
            elif _PARTIAL.fullmatch(name):
                remove(path)
        names[:] = [name for name in names if (Path(root) / name).is_dir()]


def remove(path: Path) -> None:
    """Remove a file or a folder tree if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        SparqError: the file is missing or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SparqError(f"no such file: {path}") from error
    except UnicodeDecodeError as error:
        raise SparqError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_lines(path: Path, what: str) -> Iterator[str]:
    """Stream the lines of a UTF-8 file, or of such a file in gzip, without their ends; only line feeds end a line.

    Args:
        path: the file; gzip if its name ends with `.gz`.
        what: what it is, for messages.

    Raises:
        SparqError: the file is missing, is damaged or is not UTF-8.
    """
    number = 0  # lines that are done
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for raw in file:
                yield raw.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
                number += 1
    except FileNotFoundError as error:
        raise SparqError(f"no such {what}: {path}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SparqError(
            f"{path} is not UTF-8: line {number + 1} has the byte 0x{byte:02x}; save it as UTF-8 text"
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # gzip reports a cut file as the second, a spoilt one as the third
        reason = getattr(error, "strerror", None) or str(error)
        raise SparqError(f"cannot read {what} {path} after line {number}: {reason}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SparqError: the file is missing or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SparqError(f"{path} is not a JSON file: {error}") from error


@contextlib.contextmanager
def temporary_database() -> Iterator[sqlite3.Connection]:
    """Yield a database that has no name and ends with the context, for what is too much for memory.

    It leaves memory for the folder that SQLite uses for such files: the one of `SQLITE_TMPDIR`, else /var/tmp.

    Raises:
        SparqError: the disk is full.
    """
    database = sqlite3.connect("")
    try:
        yield database
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        raise SparqError(
            "no space left on the disk for temporary files: free some, or set SQLITE_TMPDIR to a folder with more"
        ) from error
    finally:
        database.close()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Return 16 hexadecimal digits that name the given JSON-able values; the same values give the same name.

    Mappings are compared without regard to the order of their keys, so that a reordered YAML file is the same recipe.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
