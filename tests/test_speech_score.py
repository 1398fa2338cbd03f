"""`sparq score speech`: made speech beside its recordings, with listeners that hear what the test wants."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

import fake_modules
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation.naturalness import load_utmos
from sparq.evaluation.recognition import bootstrap_interval
from sparq.recipes import speech_score
from sparq.recipes.speech_score import score_speech

RATE = 16_000
WORDS = {0.1: "red lamp", 0.2: "open the door", 0.3: "red camp", 0.4: ""}
"""What the recognizer hears in a sound of this level, whoever speaks."""
ANGLES = {4000: 0.0, 5000: np.pi / 3, 6000: np.pi / 2}
"""Where the voice of a sound of so many samples lies on a circle."""


class Listening:
    def __init__(self, model: str) -> None:
        assert model in ("pretrained:whisper-base", "other")

    def normalize(self, text: str) -> str:
        return text.lower().replace("uh", "").strip()

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        return [WORDS[round(float(waveform.max()), 1)] for waveform in waveforms]


class Voices:
    def embed(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        angles = np.array([ANGLES[len(waveform)] for waveform in waveforms])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_score, "Recognizer", Listening)
    monkeypatch.setattr(speech_score, "load_speaker_encoder", Voices)


def _sound(path: Path, level: float, samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, level), RATE, subtype="FLOAT")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two recordings of `ann`, one of `bob`, one whose text is no word, and one of the training split."""
    rows = ["id\tpath\tspeaker\tsplit\tcorpus\ttext"]
    recordings = [
        ("a", "ann", "test", "red lamp", 0.1, 4000),
        ("b", "ann", "test", "open the door", 0.2, 5000),
        ("c", "bob", "test", "red lamp", 0.1, 6000),
        ("d", "bob", "test", "uh", 0.1, 6000),
        ("e", "bob", "train", "red lamp", 0.1, 6000),
    ]
    for name, speaker, split, text, level, samples in recordings:
        _sound(tmp_path / f"{name}.wav", level, samples)
        rows.append("\t".join((name, f"{name}.wav", speaker, split, "toy", text)))
    path = tmp_path / "manifest.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A system that says one word wrongly, misses a sentence, and has a voice of its own in one utterance."""
    for name, level, samples in [("a", 0.3, 4000), ("b", 0.4, 5000), ("c", 0.1, 5000)]:
        _sound(tmp_path / "made" / f"{name}.wav", level, samples)
    return tmp_path / "made"


def test_errors_and_voices(tmp_path: Path, manifest: Path, made: Path) -> None:
    recordings, system = score_speech(manifest, [made], out=tmp_path / "out", splits=["test"])
    assert (recordings.name, recordings.wer.errors, recordings.wer.length, recordings.wer.utterances) == (
        "recordings", 0, 7, 3,
    )  # fmt: skip
    assert (system.name, system.wer.errors, system.cer.errors) == ("made", 1 + 3, 1 + len("open the door"))
    # Of the recordings, ann's two are compared with each other; bob has no other one.
    assert recordings.speaker_similarity is not None
    assert recordings.speaker_similarity.value == pytest.approx(np.cos(np.pi / 3))
    expected = np.array([1, 1, np.cos(np.pi / 6)])
    assert system.speaker_similarity is not None
    assert system.speaker_similarity.value == pytest.approx(expected.mean())
    interval = (system.speaker_similarity.low, system.speaker_similarity.high)
    assert interval == pytest.approx(bootstrap_interval(expected / 100, np.ones(3)))
    assert system.utmos is None
    rows = pq.read_table(tmp_path / "out" / "records.parquet").to_pylist()
    assert [(r["task"], r["id"], r["hypothesis"]) for r in rows] == [
        ("recordings", "a", "red lamp"), ("recordings", "b", "open the door"), ("recordings", "c", "red lamp"),
        ("made", "a", "red camp"), ("made", "b", ""), ("made", "c", "red lamp"),
    ]  # fmt: skip
    assert [r["speaker_similarity"] for r in rows] == pytest.approx([0.5, 0.5, None, *expected], nan_ok=True)
    assert {r["utmos"] for r in rows} == {None}


def test_the_page_has_every_sound_and_what_was_heard(tmp_path: Path, manifest: Path, made: Path) -> None:
    made.rename(tmp_path / "a<b")
    score_speech(manifest, [tmp_path / "a<b"], out=tmp_path / "out", splits=["test"])
    page = (tmp_path / "out" / "listen.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert len(re.findall(r'<audio controls preload="metadata" src="data:audio/ogg;base64,[^"]{100,}"', page)) == 6
    assert "recordings and a&lt;b" in page
    assert "a<b" not in page
    assert "red <del>lamp</del> <ins>camp</ins>" in re.sub(r"\s+", " ", page)
    assert "<p><del>open the door</del> </p>" in page
    assert "similarity 0.87" in page
    assert "http" not in page


def test_the_command(tmp_path: Path, manifest: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    options = ["--split", "test", "--split", "train", "--limit", "1", "--recognizer", "other", "--out", out]
    _sound(made / "e.wav", 0.1, 6000)
    assert main(["score", "speech", str(manifest), str(made), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Speech beside its recordings"
    assert [line.split()[:2] for line in lines[4:6]] == [["recordings", "0.00"], ["made", "25.00"]]
    assert any("Over 2 utterances, 4 words" in line for line in lines)
    assert lines[-1] == f"listen: {out}/listen.html"
    assert main(["score", "speech", str(manifest), str(made), *options]) == 2
    assert f"{out} exists already: name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"splits": ["dev"]}, r"has no split 'dev': it has 'test', 'train'"),
        (lambda p: (p / "made" / "b.wav").unlink(), r"no such file: .*b.wav; 1 of 3 recordings have no sound there"),
        (lambda p: {"folders": [p / "made", p / "x" / "made"]}, r"two systems have one name: recordings, made, made"),
        (lambda p: (p / "made").rename(p / "recordings") and {"folders": [p / "recordings"]}, "have one name"),
        (lambda p: {"most": 0, "splits": ["test", "train"]}, r"no such file: .*e.wav"),
    ],
)
def test_mistakes(tmp_path: Path, manifest: Path, made: Path, change: object, message: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "made").symlink_to(made)
    assert callable(change)
    changed = change(tmp_path)
    options = {"folders": [made], "splits": ["test"], **(changed if isinstance(changed, dict) else {})}
    with pytest.raises(SparqError, match=message):
        score_speech(manifest, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sounds_of_one_name(tmp_path: Path, manifest: Path, made: Path) -> None:
    _sound(tmp_path / "deep" / "a.wav", 0.1, 4000)
    manifest.write_text(manifest.read_text() + "f\tdeep/a.wav\tann\ttest\ttoy\tred lamp\n")
    with pytest.raises(SparqError, match=r"made/a.wav would stand for several recordings"):
        score_speech(manifest, [made], out=tmp_path / "out", splits=["test"])


def test_utmos_where_it_is_installed(
    tmp_path: Path, manifest: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_utmos() is None

    class Score:
        def calculate_wav(self, wav: object, sr: int) -> np.ndarray:
            samples = np.asarray(wav)
            assert (samples.ndim, len(samples), sr) == (2, 1, RATE)
            return np.array(1 + 10 * samples.max())

    fake_modules.insert(monkeypatch, "utmos", Score=Score)
    recordings, _ = score_speech(manifest, [made], out=tmp_path / "out", splits=["test"])
    assert recordings.utmos is not None
    assert recordings.utmos.value == pytest.approx((2 + 3 + 2) / 3)
    page = (tmp_path / "out" / "listen.html").read_text()
    assert "UTMOS 3.00" in page
    assert "was not measured" not in page


def test_utmos_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'fairseq'", name="fairseq")

    fake_modules.insert(monkeypatch, "utmos", Score=fail)
    with pytest.raises(SparqError, match="the package utmos needs fairseq, which is not installed"):
        load_utmos()
