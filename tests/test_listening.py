"""TTS from audio, with a small vocoder and a recognizer that writes down what the test wants."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

import small_world
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import read_records
from sparq.recipes import listening
from sparq.recipes import vocoder as vocoder_recipe
from sparq.recipes.listening import Chosen, Listener, choose_spoken
from sparq.recipes.recipe import EvaluateConfig
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.train_step import Spoken
from sparq.recipes.vocoder import load_vocoder_recipe, train_vocoder
from sparq.report import read_results
from sparq.units import KMeans
from sparq.vocoder.config import FRAME_HOP
from sparq.vocoder.ge2e import Ge2eEncoder


class Deaf:
    """A recognizer that hears "red lamp" whatever is said, and remembers how long everything was."""

    heard: list[int]

    def __init__(self, model: str) -> None:
        self.model, self.heard = model, []

    def normalize(self, text: str) -> str:
        return text.replace("uh", "").strip()

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        self.heard += [len(waveform) for waveform in waveforms]
        assert all(len(waveform) for waveform in waveforms)
        return ["red lamp"] * len(waveforms)


@pytest.fixture(autouse=True)
def _deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "Recognizer", Deaf)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run/`, trained, and a vocoder of its units."""
    folder = tmp_path_factory.mktemp("world")
    manifest = small_world.make_corpus(folder / "corpus")
    backbone = small_world.make_backbone(folder / "backbone")
    small_world.write_recipe(
        folder / "recipe.yaml", manifest, backbone, frameworks=["softmax1"],
        **{"quantize.schemes": ["w8a8-rtn"], "evaluate.vocoder": "vocoder", "evaluate.tts_utterances": 2},
    )  # fmt: skip
    before = ["--set", "evaluate.vocoder=null", "--until", "train"]
    assert main(["run", str(folder / "recipe.yaml"), *before, "--out", str(folder / "run")]) == 0
    settings = ["light.width=12", "light.num_blocks=1", "train.updates=1", "train.batch=2", "train.frames=8"]
    settings += ["validate_utterances=0", "train.adversarial_from=9", "default_voice=s1"]
    encoder = Ge2eEncoder().eval().requires_grad_(False)
    encoder.fingerprint = "random"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocoder_recipe, "load_speaker_encoder", lambda reference: encoder)
        train_vocoder(load_vocoder_recipe(None, settings), run=RunFolder(folder / "run"), out=folder)
    return folder


def _listener(world: Path, **changes: object) -> Listener:
    fingerprint = KMeans.load(RunFolder(world / "run").kmeans).fingerprint
    given = {"units_fingerprint": fingerprint, "dedup": True, **changes}
    return Listener(EvaluateConfig(vocoder=world / "vocoder"), **given)


def _chosen(text: str, units: Sequence[int] = (1, 2)) -> Chosen:
    return Chosen("test", Spoken(id=text, speaker="s", corpus="c", text=text, units=list(units), seconds=1.0))


def test_a_run_is_measured_by_ear(world: Path) -> None:
    assert main(["run", str(world / "recipe.yaml"), "--out", str(world / "run")]) == 0
    run = RunFolder(world / "run")
    results = read_results(run.results)
    assert [r.name for r in results.speech_references] == ["recordings", "recordings' own units"]
    for row in results.rows:
        records = read_records(run.evaluation(row.framework, row.precision).with_suffix(".parquet"))
        tts, asr = ([r for r in records if r.task == task] for task in ("tts", "asr"))
        assert len(tts) == 2
        assert {r.id for r in asr} == {e.id for split in row.asr.values() for e in split.examples}
        assert row.tts_wer is not None
        assert row.tts_cer is not None
        assert (row.tts_wer.errors, row.tts_wer.length) == (sum(r.word_errors for r in tts), sum(r.words for r in tts))
        assert row.tts_cer.length == sum(len(r.reference) for r in tts)
        assert row.tts_wer.low is not None
        samples = sorted(run.samples(row.framework, row.precision).iterdir())
        assert {s.stem for s in samples} <= {r.id for r in tts}
        for sample in samples:
            assert soundfile.info(sample).samplerate == 16_000
            assert f"clips/{row.key}-{sample.name}" in {clip.path for clip in results.audio}
        assert {r.hypothesis for r in tts} <= {"red lamp", ""}  # nothing, where the model says nothing
    # The recognizer hears the same in everything that sounds.
    assert len({r.wer.value for r in results.speech_references}) == 1
    assert "default voice" in results.notes[0]
    assert "a Whisper too" not in results.notes[0]


def test_speech_is_cut_where_the_recognizer_ends(world: Path) -> None:
    said = _listener(world).say([unit % 8 for unit in range(4000)])
    assert len(said) == 30 * 16_000
    assert len(_listener(world, dedup=False).say([3] * 4000)) == 30 * 16_000


def test_repetitions_are_no_units_of_their_own(world: Path) -> None:
    listener = _listener(world)
    assert np.array_equal(listener.say([1, 1, 2, 2, 2, 1]), listener.say([1, 2, 1]))
    assert len(_listener(world, dedup=False).say([1, 1, 2])) == 3 * FRAME_HOP


def test_silence_is_heard_as_nothing_and_empty_texts_do_not_count(world: Path) -> None:
    listener = _listener(world)
    assert len(listener.say([])) == 0
    chosen = [_chosen("red lamp"), _chosen("uh"), _chosen("green door")]
    heard = listener.hear(chosen, [np.zeros(320, np.float32), np.zeros(320, np.float32), listener.say([])], task="tts")
    assert [(t.id, t.hypothesis, t.word_errors) for t in heard] == [("red lamp", "red lamp", 0), ("green door", "", 2)]


def test_a_vocoder_of_other_units_is_refused(world: Path) -> None:
    with pytest.raises(SparqError, match="speaks units"):
        _listener(world, units_fingerprint="0" * 16)


def test_the_spoken_are_spread_over_the_splits() -> None:
    splits = {
        name: [
            Spoken(id=f"{name}{i}", speaker="s", corpus="c", text="x" if i else "", units=[1], seconds=1.0)
            for i in range(11)
        ]
        for name in ("a", "b")
    }
    chosen = choose_spoken(splits, EvaluateConfig(tts_utterances=4))
    assert [(c.split, c.utterance.id) for c in chosen] == [("a", "a1"), ("a", "a6"), ("b", "b1"), ("b", "b6")]
    assert choose_spoken(splits, EvaluateConfig(tts_utterances=0)) == []
