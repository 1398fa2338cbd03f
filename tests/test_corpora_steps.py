"""Corpora and segments through the steps: the recipe's keys, what makes a run stale, units, clips of the report."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpus_trees
from report_records import row
from small_world import make_corpus, write_recipe
from sparq.audio.manifest import Utterance, read_manifest, write_manifest
from sparq.audio.waveform import read_waveform
from sparq.cli.main import main
from sparq.recipes.report_step import _clips
from sparq.recipes.run_folder import RunFolder
from sparq.report import AsrSplit, Example
from sparq.units import KMeans, read_summary
from sparq.units.reading import read_groups

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_corpus_in_place_of_a_manifest(tmp_path: Path, human_data: Path) -> None:
    """Real speech in LJSpeech's layout; a changed text makes the run stale."""
    rows = read_manifest(human_data / "ljspeech" / "transcripts.tsv")[:6]
    root = tmp_path / "LJSpeech-1.1"
    (root / "wavs").mkdir(parents=True)
    for utterance in rows:
        soundfile.write(root / "wavs" / f"{utterance.id}.wav", read_waveform(utterance.path), 16_000)
    metadata = root / "metadata.csv"
    metadata.write_text("".join(f"{u.id}|{u.text}|{u.text}\n" for u in rows))
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "none.tsv", tmp_path / "backbone")
    source = "{folder: LJSpeech-1.1, format: ljspeech, corpus: lj, speaker_disjoint: false, test_fraction: 0.3}"
    arguments = ["prepare", str(recipe), "--set", f"prepare.sources=[{source}]", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    prepared = read_manifest(tmp_path / "run" / "manifest.tsv")
    assert [(u.id, u.text) for u in prepared] == [(f"lj-{u.id}", u.text) for u in rows]
    assert sorted(u.split for u in prepared) == ["test", "test", "train", "train", "train", "valid"]
    assert main(arguments) == 0
    metadata.write_text(metadata.read_text().replace("the", "a", 1))
    assert main(arguments) == 2


def test_the_corpora_of_vocoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped recipes on corpora of the published layout, made small, with the centroids of another run."""
    reader = tmp_path / "LJSpeech-1.1"
    (reader / "wavs").mkdir(parents=True)
    for index in range(200):
        corpus_trees.sound(reader / "wavs" / f"LJ001-{index:04}.wav")
    corpus_trees.text(reader / "metadata.csv", *(f"LJ001-{i:04}|Red.|red" for i in range(200)))
    for part, speaker in (
        ("train-clean-100", "19"),
        ("train-clean-360", "14"),
        ("dev-clean", "84"),
        ("test-clean", "61"),
    ):
        folder = tmp_path / "LibriTTS" / part / speaker / "1"
        corpus_trees.sound(folder / f"{speaker}_1_0_0.wav", rate=24_000)
        corpus_trees.text(folder / f"{speaker}_1_0_0.normalized.txt", "Red lamp.")
    for index in range(60):
        name = f"p{225 + index}"
        corpus_trees.sound(
            tmp_path / f"VCTK-Corpus-0.92/wav48_silence_trimmed/{name}/{name}_001_mic1.flac", rate=48_000
        )
        corpus_trees.text(tmp_path / f"VCTK-Corpus-0.92/txt/{name}/{name}_001.txt", "Please call Stella.")
    fit = write_recipe(tmp_path / "fit.yaml", make_corpus(tmp_path / "small"), tmp_path / "no-backbone-needed")
    assert main(["run", str(fit), "--until", "units", "--out", str(tmp_path / "fit")]) == 0
    monkeypatch.setenv("CORPORA", str(tmp_path))
    monkeypatch.setenv("SPARQ_KMEANS", str(tmp_path / "fit" / "units" / "kmeans.safetensors"))
    k = KMeans.load(tmp_path / "fit" / "units" / "kmeans.safetensors").k
    total = {"ljspeech": 200, "libritts-vctk": 64}
    for recipe in (REPOSITORY / "recipes" / "vocoder-runs" / f"{name}.yaml" for name in list(total)):
        out = tmp_path / recipe.stem
        tiny = ["units.features=mfcc", "units.layer=0", f"units.k={k}"]
        options = [argument for change in tiny for argument in ("--set", change)]
        assert main(["run", str(recipe), "--until", "units", "--out", str(out), *options]) == 0
        found = Counter(u.split for u in read_manifest(out / "manifest.tsv"))
        assert found.keys() >= {"train", "valid", "test"}
        assert read_summary(out / "units")["splits"].keys() == found.keys()
        assert found.total() == total.pop(recipe.stem)
    assert not total


def _segments(folder: Path) -> list[Utterance]:
    samples = (0.1 * np.random.default_rng(0).standard_normal(16_000 * 4)).astype(np.float32)
    soundfile.write(folder / "a.wav", samples, 16_000, subtype="FLOAT")
    times = (("a", None, 4.0), ("b", 1.0, 0.5), ("c", 1.5, 2.5))
    return [
        Utterance(id=id_, path=folder / "a.wav", split="test", start=start, seconds=seconds)
        for id_, start, seconds in times
    ]


def test_units_are_made_from_the_segments(tmp_path: Path) -> None:
    utterances = _segments(tmp_path)
    whole = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    (waveforms,) = read_groups([utterances])
    for waveform, expected in zip(waveforms, (whole, whole[16_000:24_000], whole[24_000:]), strict=True):
        np.testing.assert_array_equal(waveform, expected)


def test_clips_of_the_report_are_the_segments(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    utterances = _segments(tmp_path)
    write_manifest(run.manifest, utterances)
    examples = tuple(Example(id=u.id, reference="a", hypothesis="b") for u in utterances)
    heard = AsrSplit(wer=100.0, words=3, utterances=3, errors=3, examples=examples)
    clips = _clips(run, [row(0, "vanilla", "full", asr={"test": heard})])
    assert [clip.path for clip in clips] == ["clips/a.wav", "clips/b.flac", "clips/c.flac"]
    assert [soundfile.info(tmp_path / clip.path).duration for clip in clips] == [4.0, 0.5, 2.5]
