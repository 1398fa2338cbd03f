"""Sound files: what is read equals what was written, and each fault has its line."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from sparq.audio.waveform import BLOCK_SECONDS, Segment, measure_waveform, probe, read_waveform
from sparq.errors import SparqError


def _tone(seconds: float, rate: int = 16_000, frequency: float = 440.0, peak: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (peak * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def _noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def _write(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str | None = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def _fault(path: Path, **options: float | Segment) -> str:
    """The message of the fault; both ways to decode raise it, and it is one line that names the file."""
    with pytest.raises(SparqError) as caught:
        read_waveform(path, **options)
    with pytest.raises(SparqError, match=re.escape(str(caught.value))):
        measure_waveform(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_mono_float_comes_back_bit_by_bit(tmp_path: Path) -> None:
    samples = _noise(16_000 * 25 + 7)  # several blocks
    waveform = read_waveform(_write(tmp_path / "a.wav", samples))
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, samples)
    assert measure_waveform(tmp_path / "a.wav") == len(samples) / 16_000


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels = np.stack([_noise(8000, 1), _noise(8000, 2), _noise(8000, 3)], axis=1)
    waveform = read_waveform(_write(tmp_path / "a.wav", channels))
    np.testing.assert_allclose(waveform, channels.astype(np.float64).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_other_rates_are_resampled_as_in_one_go(tmp_path: Path, rate: int) -> None:
    samples = _noise(round(rate * (2 * BLOCK_SECONDS + 0.123)))
    waveform = read_waveform(_write(tmp_path / "a.wav", samples, rate))
    assert len(waveform) == pytest.approx(len(samples) * 16_000 / rate, abs=1)
    np.testing.assert_array_equal(waveform, soxr.resample(samples, rate, 16_000, quality="HQ"))


@given(rate=st.sampled_from([8_000, 12_000, 44_100]), frequency=st.floats(100, 3_000), channels=st.integers(1, 2))
@settings(max_examples=15)
def test_a_tone_keeps_its_frequency_and_level(
    tmp_path_factory: pytest.TempPathFactory, rate: int, frequency: float, channels: int
) -> None:
    samples = np.repeat(_tone(0.5, rate, frequency)[:, None], channels, axis=1)
    waveform = read_waveform(_write(tmp_path_factory.mktemp("tone") / "a.wav", samples, rate))
    middle = slice(800, -800)  # resampling filters ring at the ends
    np.testing.assert_allclose(waveform[middle], _tone(0.5, 16_000, frequency)[middle], atol=2e-3)


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "PCM_24"),
        ("a.wav", "ULAW"),
        ("a.flac", None),
        ("a.ogg", "VORBIS"),
        ("a.ogg", "OPUS"),
        ("a.mp3", None),
        ("a.aiff", None),
        ("a.nist", None),
    ],
)
def test_formats(tmp_path: Path, name: str, subtype: str | None) -> None:
    tone = _tone(1.0)
    waveform = read_waveform(_write(tmp_path / name, tone, subtype=subtype))
    assert len(waveform) == len(tone)
    assert np.corrcoef(waveform[1600:-1600], tone[1600:-1600])[0, 1] > 0.99


def test_probe_reads_the_header(tmp_path: Path) -> None:
    info = probe(_write(tmp_path / "a.wav", np.zeros((4410, 2), np.float32), 44_100))
    assert (info.seconds, info.sample_rate, info.channels) == (0.1, 44_100, 2)


def test_missing(tmp_path: Path) -> None:
    assert "no such audio file" in _fault(tmp_path / "none.wav")
    with pytest.raises(SparqError, match="no such audio file"):
        probe(tmp_path / "none.wav")


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in _fault(tmp_path)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    assert "is empty (0 bytes)" in _fault(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.ogg", "a.txt", "a.raw"])
def test_not_audio(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the quick brown fox\n" * 200)
    assert "is not audio" in _fault(tmp_path / name)


def test_no_samples(tmp_path: Path) -> None:
    assert "no samples" in _fault(_write(tmp_path / "a.wav", np.zeros(0, np.float32)))


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "FLOAT"),
        ("a.w64", None),
        ("a.rf64", None),
        ("a.aiff", None),
        ("a.au", None),
        ("a.caf", None),
        ("a.nist", None),
        ("a.flac", None),
        ("a.ogg", "VORBIS"),
        ("a.ogg", "OPUS"),
        ("a.mp3", None),
    ],
)
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_truncated(tmp_path: Path, name: str, subtype: str | None, part: float) -> None:
    path = _write(tmp_path / name, _noise(16_000 * 12), subtype=subtype)
    read_waveform(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert "is truncated" in _fault(path)


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_ogg_cut_anywhere(tmp_path: Path, subtype: str) -> None:
    path = _write(tmp_path / "a.ogg", _noise(16_000 * 3), subtype=subtype)
    content = path.read_bytes()
    for size in [*range(200, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:size])
        assert "is truncated" in _fault(path)


def test_truncated_wav_says_both_lengths(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", _noise(16_000 * 10), subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: 44 + 16_000 * 4 * 2])
    assert "promises 10.000 s, but only 4.000 s can be read" in _fault(path)


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_F000])
def test_a_streamed_wav_with_a_placeholder_size_is_whole(tmp_path: Path, size: int) -> None:
    path = _write(tmp_path / "a.wav", _tone(1.0), subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)
    assert len(read_waveform(path)) == 16_000


def test_silent(tmp_path: Path) -> None:
    assert "is silent: its peak is 5.0e-05" in _fault(_write(tmp_path / "a.wav", _tone(1.0, peak=5e-5)))
    # Opposite channels cancel in the mean.
    tone = _tone(1.0)
    assert "is silent" in _fault(_write(tmp_path / "b.wav", np.stack([tone, -tone], axis=1)))
    # Nothing is left of a tone above the new band.
    high = _tone(12.0, 44_100, 15_000.0)
    fade = np.hanning(len(high)).astype(np.float32)
    assert "is silent" in _fault(_write(tmp_path / "c.wav", high * fade, 44_100))


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_bad_samples_are_counted(tmp_path: Path, rate: int) -> None:
    samples = np.stack([_tone(25.0, rate), _tone(25.0, rate)], axis=1)
    samples[7, 0] = np.nan
    samples[8] = [np.inf, -np.inf]
    samples[-1, 1] = np.inf
    message = _fault(_write(tmp_path / "a.wav", samples, rate))
    assert "has 4 samples that are NaN or infinite" in message


def test_ten_hours_are_refused_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    bytes_of_samples = 36_000 * 8_000
    _write(path, np.zeros(0, np.int16), 8_000, "PCM_U8")
    header = bytearray(path.read_bytes()[:44])
    header[4:8] = struct.pack("<I", 36 + bytes_of_samples)
    header[40:44] = struct.pack("<I", bytes_of_samples)
    with path.open("wb") as file:  # a hole in the file: nothing of it is on the disk
        file.write(header)
        file.truncate(44 + bytes_of_samples)
    assert probe(path).seconds == 36_000
    assert "lasts 10.00 hours, longer than the limit of 3600 s: split it" in _fault(path)


def test_longest_is_a_choice(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", _tone(2.0))
    assert "longer than the limit of 1.5 s" in _fault(path, max_seconds=1.5)
    assert len(read_waveform(path, max_seconds=2.0)) == 32_000


def test_too_short(tmp_path: Path) -> None:
    assert "lasts 0.0400 s, shorter than 0.05 s" in _fault(_write(tmp_path / "a.wav", _tone(0.04)))
    assert len(read_waveform(_write(tmp_path / "b.wav", _tone(0.05)))) == 800


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.wav", _tone(1.0))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in _fault(path)


# --- segments


@given(start=st.floats(0, 24), seconds=st.floats(0.05, 24), rate=st.sampled_from([8_000, 16_000, 44_100]))
@settings(max_examples=25)
def test_a_segment_is_what_a_slice_of_the_file_is(
    tmp_path_factory: pytest.TempPathFactory, start: float, seconds: float, rate: int
) -> None:
    samples = _noise(rate * 25)
    path = _write(tmp_path_factory.mktemp("audio") / "a.wav", samples, rate)
    segment = Segment(start=start, seconds=seconds)
    first, end = round(start * rate), round((start + seconds) * rate)
    if end > len(samples) + rate / 2:
        assert "but a segment from" in _fault(path, segment=segment)
        return
    expected = soxr.resample(samples[first:end], rate, 16_000, quality="HQ") if rate != 16_000 else samples[first:end]
    if min(end, len(samples)) - first < 0.05 * rate:
        assert "shorter than 0.05 s" in _fault(path, segment=segment)
        return
    np.testing.assert_array_equal(read_waveform(path, segment=segment), expected)
    assert measure_waveform(path, segment=segment) == len(expected) / 16_000


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_segments_of_compressed_files(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, _tone(20.0), subtype=None)
    whole = soundfile.read(path, dtype="float32")[0]
    tolerance = 0 if name == "a.flac" else 1e-5
    np.testing.assert_allclose(read_waveform(path), whole, atol=tolerance)
    part = read_waveform(path, segment=Segment(start=7.5, seconds=4.0))
    np.testing.assert_allclose(part, whole[120_000:184_000], atol=tolerance)


def test_a_segment_is_checked_alone(tmp_path: Path) -> None:
    samples = _tone(4.0)
    samples[16_000:32_000] = 0
    samples[50_000] = np.nan
    path = _write(tmp_path / "a.wav", samples)
    assert len(read_waveform(path, segment=Segment(start=2.0, seconds=1.0))) == 16_000
    assert f"{path} from 1.000 s on is silent" in _fault(path, segment=Segment(start=1.0, seconds=1.0))
    assert f"{path} from 3.000 s on has 1 samples" in _fault(path, segment=Segment(start=3.0, seconds=1.0))
    assert "longer than the limit of 0.5 s" in _fault(path, segment=Segment(start=2.0, seconds=1.0), max_seconds=0.5)


def test_a_truncated_file_fails_where_it_is_cut(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.flac", _noise(16_000 * 20), subtype=None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read_waveform(path, segment=Segment(start=2.0, seconds=3.0))) == 48_000
    assert "is truncated" in _fault(path, segment=Segment(start=8.0, seconds=8.0))
