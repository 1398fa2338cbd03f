"""Recordings inside of the page: the bytes of small audio files as data URIs."""

import base64
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sparq.report.numbers import show_bytes

MOST_BYTES = 200_000
"""Larger files are not embedded, to keep the page small."""

_SIGNATURES = (
    (b"OggS", "audio/ogg"),
    (b"RIFF", "audio/wav"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A data URI, or the reason why there is none."""

    uri: Markup | None
    reason: str | None = None


def embed(path: Path) -> Clip:
    """Return an audio file as a data URI, its bytes unchanged.

    A file that is absent, too large or not audio gives a reason, which the page prints in the player's place.
    The type is read from the bytes, so no other file of the machine gets into a report by a wrong path.
    """
    if not path.is_file():
        return Clip(uri=None, reason=f"there is no file {path.name}")
    size = path.stat().st_size
    return _too_large(path.name, size) if size > MOST_BYTES else embed_bytes(path.name, path.read_bytes())


def embed_bytes(name: str, data: bytes) -> Clip:
    """Return the content of an audio file as a data URI; see `embed`."""
    if len(data) > MOST_BYTES:
        return _too_large(name, len(data))
    kind = next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), None)
    if kind is None:
        return Clip(uri=None, reason=f"{name} is no Ogg, WAV, FLAC or MP3 file")
    return Clip(uri=Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}"))


def _too_large(name: str, size: int) -> Clip:
    return Clip(uri=None, reason=f"{name} has {show_bytes(size)}, more than {show_bytes(MOST_BYTES)}")
