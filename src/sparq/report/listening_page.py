"""A page on which recordings and what systems made of them are heard side by side, with what a recognizer heard."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float32

from sparq.files import write_text
from sparq.report.align import Segment, align
from sparq.report.audio import Clip, embed_bytes
from sparq.report.tables import Table
from sparq.report.templates import render_template
from sparq.types import SAMPLE_RATE


@dataclass(frozen=True, kw_only=True)
class Sound:
    """One system's sound of an utterance.

    Attributes:
        label: which system.
        clip: the sound, inside of the page.
        heard: what a recognizer wrote down, aligned with the text; None where none listened.
        note: what else was measured of it, or "".
    """

    label: str
    clip: Clip
    heard: tuple[Segment, ...] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """An utterance as every system has it."""

    id: str
    text: str
    sounds: tuple[Sound, ...]


def sound(
    label: str, samples: Float32[np.ndarray, "samples"], *, text: str = "", heard: str | None = None, note: str = ""
) -> Sound:
    """Return a system's sound for the page, as Ogg Vorbis; `text` and what was `heard` of it are normalized alike."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    segments = None if heard is None else align(text, heard)
    return Sound(label=label, clip=embed_bytes(label, file.getvalue()), heard=segments, note=note)


def write_listening_page(path: Path, *, title: str, table: Table, utterances: Sequence[SideBySide]) -> None:
    """Write the page atomically: the table, and below it each utterance with its players side by side."""
    write_text(path, render_template("listening.html.jinja", title=title, table=table, utterances=utterances))
