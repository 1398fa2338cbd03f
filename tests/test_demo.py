"""The demo at its tiny size, on the real backbone and features and with the shipped adapters."""

import dataclasses
import json
import zipfile
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import pytest

from sparq.adaptation import read_description
from sparq.audio.manifest import read_manifest
from sparq.cli.main import main
from sparq.configuration import from_mapping
from sparq.recipes.demo import QUICK, QUICK_LIVE_UPDATES
from sparq.recipes.recipe import TrainConfig, load_recipe, used_settings
from sparq.report import read_results
from sparq.tokens import JointVocabulary
from sparq.units import KMeans

DEMO = Path(str(files("sparq") / "demo"))
FRAMEWORKS = ("vanilla", "softmax1", "max_shift")


def test_the_corpus_holds_out_sentences_and_a_voice(tmp_path: Path) -> None:
    assert (DEMO / "corpus.zip").stat().st_size < 12e6
    with zipfile.ZipFile(DEMO / "corpus.zip") as archive:
        archive.extractall(tmp_path)
    utterances = read_manifest(tmp_path / "manifest.tsv")
    said = {split: {u.text for u in utterances if u.split == split} for split in {u.split for u in utterances}}
    assert set(said) == {"train", "valid", "test", "test-unseen-voice"}
    for split in said.keys() - {"train"}:
        assert not said[split] & said["train"]
    heard = {u.speaker for u in utterances if u.split == "train"}
    assert len(heard) == 6
    assert not heard & {u.speaker for u in utterances if u.split == "test-unseen-voice"}


def test_the_shipped_adapters_are_of_the_shipped_recipe() -> None:
    recipe = load_recipe(DEMO / "demo.yaml", environ={"SPARQ_DEMO_CORPUS": "/nowhere"})
    assert recipe.frameworks == FRAMEWORKS
    for framework in FRAMEWORKS:
        folder = DEMO / "adapters" / framework
        description = read_description(folder)
        assert description.attention == framework
        settings = description.training["settings"]
        # A key that the recipe got since has its default there, and had no other effect then.
        assert from_mapping(TrainConfig, settings["train"]) == dataclasses.replace(
            recipe.train, checkpoint_updates=TrainConfig(updates=1).checkpoint_updates
        )
        assert {k: settings[k] for k in ("model", "seed")} == used_settings(recipe, "model", "seed")
        assert description.training["updates"] == recipe.train.updates
        assert len((folder / "train.jsonl").read_text().splitlines()) == recipe.train.updates
        units = KMeans.load(folder / "kmeans.safetensors").fingerprint
        vocabulary = JointVocabulary.load(folder / "vocabulary", units_fingerprint=units)
        assert vocabulary.fingerprint == description.vocabulary_fingerprint
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == recipe.model.backbone


@pytest.mark.pretrained
def test_the_quick_demo(
    smollm2_folder: Path,
    whisper_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Two threads beside another worker's tests wait for each other more than they compute.
    monkeypatch.setattr("sparq.recipes.demo.QUICK", (*QUICK, "threads=1"))
    assert smollm2_folder.parent == whisper_folder.parent
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "vanilla" in printed.out
    assert f"{QUICK_LIVE_UPDATES} updates repeated live" in printed.err
    results = read_results(tmp_path / "out" / "results.json")
    full, low = results.rows
    assert full.asr_wer is not None
    assert full.asr_wer.value < 50  # four sentences of each split; the whole demo measures more
    # The recognizer hears the model, the recordings and their units; the quick demo's two sentences say no more.
    assert full.tts_cer is not None
    assert full.tts_wer is not None
    assert [reference.name for reference in results.speech_references] == ["recordings", "recordings' own units"]
    assert "the prompt" not in results.notes[0]
    assert "pretrained:whisper-tiny.en, layer 2" in results.notes[0]
    assert full.prose_ppl is not None
    assert low.prose_ppl is not None
    assert low.prose_ppl.value > 20 * full.prose_ppl.value
    live = results.curves["vanilla"].live
    assert live is not None
    stored = results.curves["vanilla"].points[:QUICK_LIVE_UPDATES]
    if [point.tokens for point in live.points] == [point.tokens for point in stored]:
        # Another CPU rounds bfloat16 products in another order; the same training is within a small part of a nat.
        assert live.max_abs_difference is not None
        assert live.max_abs_difference < 0.5
    else:  # On a CPU without bfloat16 some frames get other units, lengths differ, and so do batches.
        assert live.max_abs_difference is None
        # Means of all twelve updates are .01 nats apart, of three 0.4.
        assert abs(fmean(p.loss for p in live.points) - fmean(p.loss for p in stored)) < 1
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 0
    assert "report: already done" in capsys.readouterr().err
