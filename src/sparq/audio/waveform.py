"""Sound files of any libsndfile format as mono 16 kHz float32, or one line that says what is wrong with them.

A file is decoded in blocks: channels are averaged, other rates are resampled by soxr (quality HQ, the same
samples as in one go). libsndfile quietly shortens a truncated file to what is there, so the promise of its
header is looked up in libsndfile's own log of the header, and an Ogg file must end with its last page.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32

from sparq.errors import SparqError
from sparq.types import SAMPLE_RATE, Seconds

MAX_SECONDS: Seconds = 3600.0
"""Longest file that is taken as one utterance."""

MIN_SECONDS: Seconds = 0.05
"""Shortest file: less than two frames of a 20 ms extractor hold no speech."""

SILENCE_PEAK = 1e-4
"""A file whose largest magnitude is below this (-80 dB of full scale) is taken as silent."""

BLOCK_SECONDS: Seconds = 10.0

# Writers to a pipe cannot know the size and leave a placeholder near the largest number; 0 gives a file of
# no samples.
_STREAMED_SIZE = 0x7FFF_0000
_PROMISED_BYTES = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
_LARGEST_OGG_PAGE = 27 + 255 + 255 * 255  # bytes: header, segment table, segments (RFC 3533, section 6)
# Without a Xing header the length of an MP3 file is estimated from its bit rate, padding included.
_MP3_SLACK: Seconds = 0.1
# Frames of MP3 use bits of earlier ones, so decoding is wrong after a seek (for 0.12 s of speech at 23 kbit/s), and
# soundfile seeks after every read.
_MP3_LEAD: Seconds = 1.0


MAX_OVERSHOOT: Seconds = 0.5
"""How far a segment may reach past the end of its file, which then ends it, as in Kaldi's extract-segments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a recording.

    Attributes:
        start: where it begins, in seconds from the start of the file.
        seconds: its length in seconds.
    """

    start: Seconds
    seconds: Seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What the header of a sound file says.

    Attributes:
        seconds: length in seconds.
        sample_rate: samples a second and channel, in Hz.
        channels: number of channels.
    """

    seconds: Seconds
    sample_rate: int
    channels: int


def probe(path: str | Path) -> AudioInfo:
    """Read a sound file's header only; the samples are not looked at.

    Raises:
        SparqError: missing, a folder, empty, not audio, or visibly truncated.
    """
    with _open(Path(path)) as file:
        return AudioInfo(seconds=file.frames / file.samplerate, sample_rate=file.samplerate, channels=file.channels)


def read_waveform(
    path: str | Path, *, segment: Segment | None = None, max_seconds: Seconds = MAX_SECONDS
) -> Float32[np.ndarray, "samples"]:
    """Read a sound file, or a segment of it, as mono float32 at 16 kHz, full scale at 1.

    Args:
        path: a file in any format of libsndfile (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, NIST, ...).
        segment: the part to read; the whole file if None. Nothing before it is decoded.
        max_seconds: the longest file to take; longer ones are refused by their header, before decoding.

    Returns:
        `round(seconds * 16000)` samples; stereo is averaged, other rates are resampled.

    Raises:
        SparqError: the file is missing, a folder, empty, without samples, truncated, not audio, silent,
            shorter than 0.05 s, longer than `max_seconds`, has samples that are NaN or infinite, or ends more
            than 0.5 s before the segment does.
    """
    return np.concatenate(list(_checked_blocks(Path(path), segment, max_seconds)))


def measure_waveform(
    path: str | Path, *, segment: Segment | None = None, max_seconds: Seconds = MAX_SECONDS
) -> Seconds:
    """Decode and check as `read_waveform` does, holding one block at a time; return the length.

    Raises:
        SparqError: as `read_waveform`.
    """
    return sum(len(block) for block in _checked_blocks(Path(path), segment, max_seconds)) / SAMPLE_RATE


def _open(path: Path) -> "soundfile.SoundFile":
    """Open a sound file, or say why not."""
    if path.is_dir():
        raise SparqError(f"{path} is a folder, not an audio file: name a file in it")
    if not path.exists():
        raise SparqError(f"no such audio file: {path}; check the path and the folder it is relative to")
    if not path.is_file():
        raise SparqError(f"{path} is not a regular file: copy the audio to a file first")
    try:
        with path.open("rb") as raw:
            head = raw.read(1024)
    except OSError as error:
        raise SparqError(f"cannot read {path}: {error.strerror}; check its permissions and the disk") from error
    if not head:
        raise SparqError(f"{path} is empty (0 bytes): copy or record it again")
    try:
        file = soundfile.SoundFile(path)
    # A file named *.raw has no header to open it by, which soundfile reports as a TypeError.
    except (soundfile.LibsndfileError, TypeError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else "a headerless format"
        if "malformed" in reason:
            raise SparqError(f"{path} is truncated or damaged ({reason.strip()}): copy it again") from error
        raise SparqError(f"{path} is not audio that libsndfile can read: convert it to WAV or FLAC") from error
    try:
        _check_promise(path, file, head)
    except SparqError:
        file.close()
        raise
    return file


def _check_promise(path: Path, file: "soundfile.SoundFile", head: bytes) -> None:
    """Compare what the header promises with what the file holds, where libsndfile tells."""
    if file.format == "OGG" and not _ends_with_last_ogg_page(path):
        raise SparqError(
            f"{path} is truncated: its stream stops without an end page after"
            f" {_length(file.frames, file)}; copy it again"
        )
    promised = None
    for match in _PROMISED_BYTES.finditer(file.extra_info):
        header_bytes, held_bytes = int(match[1]), int(match[2])
        if held_bytes < header_bytes < _STREAMED_SIZE:
            promised = round(file.frames * header_bytes / max(held_bytes, 1))
    if file.format == "NIST":  # the log of this format is silent, its header is plain text
        count = re.search(rb"sample_count -i (\d+)", head)
        if count and int(count[1]) > file.frames:
            promised = int(count[1])
    if promised is not None:
        raise _truncated(path, file, promised, file.frames)


def _ends_with_last_ogg_page(path: Path) -> bool:
    """Tell whether the last page of an Ogg file is whole and marked as the end of its stream.

    libsndfile's log tells only where the cut is not within that page.
    """
    with path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - _LARGEST_OGG_PAGE))
        tail = raw.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    num_segments = page[26]
    return len(page) >= 27 + num_segments + sum(page[27 : 27 + num_segments])


def _truncated(path: Path, file: "soundfile.SoundFile", promised: int, held: int) -> SparqError:
    return SparqError(
        f"{path} is truncated: its header promises {_length(promised, file)},"
        f" but only {_length(held, file)} can be read; copy it again"
    )


def _length(frames: int, file: "soundfile.SoundFile") -> str:
    return f"{frames / file.samplerate:.3f} s"


def _span(path: Path, file: "soundfile.SoundFile", segment: Segment | None) -> tuple[int, int]:
    """Return the first frame and the number of frames to read."""
    if segment is None:
        return 0, file.frames
    first, end = (round(s * file.samplerate) for s in (segment.start, segment.start + segment.seconds))
    if end > file.frames + MAX_OVERSHOOT * file.samplerate:
        raise SparqError(
            f"{path} lasts {_length(file.frames, file)}, but a segment from {segment.start:.3f} s to"
            f" {segment.start + segment.seconds:.3f} s is wanted: correct the segment"
        )
    return first, max(0, min(end, file.frames) - first)


def _raw_blocks(
    path: Path, file: "soundfile.SoundFile", first: int, promised: int
) -> Iterator[Float32[np.ndarray, "frames channels"]]:
    """Yield the decoded frames at the file's own rate."""
    block_frames = round(BLOCK_SECONDS * file.samplerate)
    whole = (first, promised) == (0, file.frames)
    held = 0
    while True:
        # A whole file is read to its end, wherever its header puts that.
        wanted = block_frames if whole else min(block_frames, promised - held)
        try:
            place = first + held
            lead = min(place, round(_MP3_LEAD * file.samplerate)) if file.format == "MP3" else 0
            if lead or not held:
                file.seek(place - lead)
            block = file.read(lead + wanted, dtype="float32", always_2d=True)[lead:]
        except soundfile.LibsndfileError as error:
            raise SparqError(
                f"{path} is truncated or damaged: decoding fails after {_length(first + held, file)} of"
                f" {_length(first + promised, file)} ({error.error_string.strip()}); copy it again"
            ) from error
        if not len(block):
            break
        held += len(block)
        yield block
    slack = _MP3_SLACK * file.samplerate if file.format == "MP3" else 0
    if held < promised - slack:
        raise _truncated(path, file, first + promised, first + held)


def _checked_blocks(
    path: Path, segment: Segment | None, max_seconds: Seconds
) -> Iterator[Float32[np.ndarray, "samples"]]:
    """Yield mono blocks at 16 kHz; faults that show only at the end come after the last block."""
    with _open(path) as file:
        if not file.frames:
            raise SparqError(f"{path} has a header but no samples: record or export it again")
        first, frames = _span(path, file, segment)
        seconds = frames / file.samplerate
        what = f"{path}" if segment is None else f"{path} from {segment.start:.3f} s on"
        if seconds > max_seconds:
            raise SparqError(
                f"{what} lasts {seconds / 3600:.2f} hours, longer than the limit of {max_seconds:g} s:"
                " split it into utterances"
            )
        if seconds < MIN_SECONDS:
            raise SparqError(f"{what} lasts {seconds:.4f} s, shorter than {MIN_SECONDS} s: drop it")
        resampler = (
            soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
            if file.samplerate != SAMPLE_RATE
            else None
        )
        peak, num_bad = 0.0, 0
        for block in _raw_blocks(path, file, first, frames):
            num_bad += int(np.count_nonzero(~np.isfinite(block)))
            if num_bad:
                continue  # only the count is still of interest
            mono = block.mean(axis=1, dtype=np.float32)
            samples = mono if resampler is None else resampler.resample_chunk(mono)
            peak = max(peak, float(np.abs(samples).max(initial=0.0)))
            yield samples
        if num_bad:
            raise SparqError(f"{what} has {num_bad} samples that are NaN or infinite: export it again without them")
        if resampler is not None:
            tail = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            peak = max(peak, float(np.abs(tail).max(initial=0.0)))
            yield tail
        if peak < SILENCE_PEAK:
            raise SparqError(f"{what} is silent: its peak is {peak:.1e}, below {SILENCE_PEAK:.0e}; record it again")
