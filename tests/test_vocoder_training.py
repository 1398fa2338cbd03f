"""Training: batches, averages, exact resume; the files of a vocoder; all on a corpus of chords."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import small_world
from sparq.audio import read_manifest
from sparq.cli.main import main
from sparq.configuration import to_mapping
from sparq.errors import SparqError
from sparq.files import read_json, write_json
from sparq.recipes import vocoder as vocoder_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.vocoder import VocoderRecipe, load_vocoder_recipe, speaker_means, train_vocoder
from sparq.units import read_units
from sparq.vocoder import training
from sparq.vocoder.analysis import Recording, analyze, fit_to_frames
from sparq.vocoder.config import FRAME_HOP, GeneratorConfig, HifiGanConfig, LightConfig
from sparq.vocoder.crops import Crops
from sparq.vocoder.discriminators import SpectrogramDiscriminators
from sparq.vocoder.ge2e import Ge2eEncoder
from sparq.vocoder.settings import TrainSettings
from sparq.vocoder.storage import Vocoder, load_vocoder
from sparq.vocoder.training import Trainer
from sparq.vocoder.validation import Validation
from sparq.vocoder.voice import VocoderNetworks, build_networks

LIGHT = LightConfig(width=12, expansion=2, num_blocks=1, kernel=3)
HIFIGAN = HifiGanConfig(unit_dim=6, channels=32, resblock_kernels=(3,), resblock_dilations=(1,))
# The widest window of the losses has 2,048 samples, so a piece has at least seven frames.
SETTINGS = TrainSettings(
    updates=5, batch=2, frames=8, learning_rate=1e-3, mel_weight=1.0, spectral_weight=1.0, adversarial_from=2,
    checkpoint_updates=1, validate_updates=2, ema=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("world")
    manifest = small_world.make_corpus(folder / "corpus")
    recipe = small_world.write_recipe(folder / "recipe.yaml", manifest, folder / "no-backbone-needed")
    assert main(["run", str(recipe), "--until", "units", "--out", str(folder / "run")]) == 0
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def encoder() -> Ge2eEncoder:
    """Of random weights: the real ones are another test's."""
    torch.manual_seed(0)
    encoder = Ge2eEncoder().eval().requires_grad_(False)
    encoder.fingerprint = "random"
    return encoder


@pytest.fixture(autouse=True)
def _random_encoder(encoder: Ge2eEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocoder_recipe, "load_speaker_encoder", lambda reference: encoder)


@pytest.fixture(scope="module")
def recordings(run: RunFolder, encoder: Ge2eEncoder, tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    cache = tmp_path_factory.mktemp("analysis") / "train.safetensors"
    rows = list(read_units(run.units, "train"))
    first = analyze(read_manifest(run.manifest), rows, encoder, cache, label="analyze")
    written = cache.stat().st_mtime_ns
    again = analyze(read_manifest(run.manifest), rows, encoder, cache, label="analyze")
    assert cache.stat().st_mtime_ns == written
    assert all(
        np.array_equal(a.hertz, b.hertz) and np.array_equal(a.vector, b.vector)
        for a, b in zip(first, again, strict=True)
    )
    return first


def _trainer(
    config: GeneratorConfig, recordings: list[Recording], folder: Path, settings: TrainSettings = SETTINGS
) -> Trainer:
    networks = build_networks(config, num_units=8, seed=settings.seed)
    return Trainer(networks, recordings, settings, folder=folder, identity="test")


def _weights(networks: VocoderNetworks) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in networks.state_dict().items()}


def test_recordings_have_a_value_for_each_frame(recordings: list[Recording]) -> None:
    for recording in recordings:
        assert len(recording.hertz) == len(recording.voiced) == len(recording.units)
        assert len(recording.waveform()) == FRAME_HOP * len(recording.units)
        assert np.linalg.norm(recording.vector) == pytest.approx(1, abs=1e-5)
    assert fit_to_frames(np.ones(5, np.float32), 1).sum() == 5
    assert len(fit_to_frames(np.ones(1000, np.float32), 2)) == 640


def test_a_batch_is_decided_by_seed_and_update(recordings: list[Recording]) -> None:
    crops = Crops(recordings, frames=12, batch=3, seed=1)
    assert crops.num_short == sum(len(r.units) < 12 for r in recordings) > 0
    batch, (_, again) = crops.batch(4), list(crops.ahead(3, 5))
    other = Crops(recordings, frames=12, batch=3, seed=2).batch(4)
    for field in dataclasses.fields(batch):
        assert torch.equal(getattr(batch, field.name), getattr(again, field.name)), field.name
    assert not torch.equal(batch.samples, other.samples)
    # Units, pitch and samples of a piece are of one place in one recording.
    for row in range(3):
        samples = batch.samples[row].numpy()
        matches = [
            (r, first)
            for r in recordings
            for first in range(len(r.units) - 11)
            if np.array_equal(r.waveform()[first * FRAME_HOP : (first + 12) * FRAME_HOP], samples)
        ]
        ((recording, first),) = matches
        assert batch.units[row].tolist() == recording.units[first : first + 12].tolist()
        assert batch.hertz[row].tolist() == recording.hertz[first : first + 12].tolist()
        assert int((batch.durations[row] * batch.real[row]).sum()) == len(recording.units)


def test_pieces_longer_than_all_recordings_are_refused(recordings: list[Recording]) -> None:
    with pytest.raises(SparqError, match="no training recording has 500 frames"):
        Crops(recordings, frames=500, batch=1, seed=0)


@pytest.mark.parametrize("config", [LIGHT, HIFIGAN], ids=["light", "hifigan"])
def test_a_resumed_training_ends_with_the_same_bytes(
    config: GeneratorConfig, recordings: list[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # HiFi-GAN's own critics have 70 million parameters; whichever they are, they are updated and stored alike.
    monkeypatch.setattr(training, "HifiGanDiscriminators", SpectrogramDiscriminators)
    at_once = _trainer(config, recordings, tmp_path / "a")
    at_once.train("a")
    while (stopped := _trainer(config, recordings, tmp_path / "b")).progress.updates < SETTINGS.updates:
        stopped.train("b", seconds=0.0)  # one update a session
    states = [(tmp_path / folder / "checkpoint" / "state.safetensors").read_bytes() for folder in "ab"]
    assert states[0] == states[1]
    logs = [[json.loads(line) for line in (tmp_path / f / "train.jsonl").read_text().splitlines()] for f in "ab"]
    assert [r["update"] for r in logs[0]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(*logs, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    assert "critics" not in logs[0][1]
    assert "critics" in logs[0][2]


def test_what_came_after_the_checkpoint_is_done_again(recordings: list[Recording], tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_updates=10)
    _trainer(LIGHT, recordings, tmp_path, settings).train("a", seconds=0.0)
    with (tmp_path / "train.jsonl").open("a") as log:
        log.write('{"update": 2}\n{"update": 3}\n')  # as if killed two updates later
    trainer = _trainer(LIGHT, recordings, tmp_path, settings)
    trainer.train("a")
    assert [json.loads(line)["update"] for line in trainer.log_file.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_other_settings_do_not_go_on(recordings: list[Recording], tmp_path: Path) -> None:
    _trainer(LIGHT, recordings, tmp_path).train("a", seconds=0.0)
    with pytest.raises(SparqError, match="training with other settings or data"):
        _trainer(LIGHT, recordings, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e-2))


def test_the_average_is_that_of_the_weights_after_each_update(recordings: list[Recording], tmp_path: Path) -> None:
    trainer = _trainer(LIGHT, recordings, tmp_path)
    expected = _weights(trainer.networks)
    for update in range(3):
        trainer = _trainer(LIGHT, recordings, tmp_path)
        trainer.train("a", seconds=0.0)
        decay = min(SETTINGS.ema, (1 + update) / (10 + update))
        now = _weights(trainer.networks)
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in expected}
    for name, tensor in trainer.averaged.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_bfloat16_computes_nearly_the_same(recordings: list[Recording], tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = _trainer(LIGHT, recordings, tmp_path / dtype, dataclasses.replace(SETTINGS, dtype=dtype))
        trainer.train("a", seconds=0.0)
        losses[dtype] = json.loads(trainer.log_file.read_text())
        assert all(p.dtype == torch.float32 for p in trainer.networks.parameters())
    for name in ("mel", "spectral", "pitch"):
        assert losses["bfloat16"][name] == pytest.approx(losses["float32"][name], rel=0.03), name
    assert losses["bfloat16"]["gradient"] != losses["float32"]["gradient"]


def test_training_makes_it_better(recordings: list[Recording], tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, updates=40, learning_rate=1e-2, adversarial_from=1000, checkpoint_updates=40
    )
    trainer = _trainer(LIGHT, recordings, tmp_path, settings)
    validation = Validation(recordings[:4])
    before = validation(trainer.networks)["valid_mel"]
    trainer.train("a")
    assert validation(trainer.averaged)["valid_mel"] < 0.7 * before
    log = [json.loads(line) for line in trainer.log_file.read_text().splitlines()]
    for name in ("mel", "spectral", "duration"):
        assert np.mean([r[name] for r in log[-5:]]) < np.mean([r[name] for r in log[:5]]), name


# The command and the folder


RECIPE = VocoderRecipe(light=LIGHT, train=dataclasses.replace(SETTINGS, updates=2), validate_utterances=2)


@pytest.fixture(scope="module")
def trained(run: RunFolder, encoder: Ge2eEncoder, tmp_path_factory: pytest.TempPathFactory) -> Vocoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocoder_recipe, "load_speaker_encoder", lambda reference: encoder)
        return train_vocoder(RECIPE, run=run, out=tmp_path_factory.mktemp("vocoder"))


def test_a_vocoder_says_what_it_is(trained: Vocoder, run: RunFolder, recordings: list[Recording]) -> None:
    description = trained.description
    assert description.config == LIGHT
    assert description.units.features == "mfcc"
    assert description.training["updates"] == 2
    assert description.training["utterances"] == len(recordings)
    assert set(description.voices) == {"s0", "s1", "s2"}
    means = speaker_means(recordings)
    assert description.default_voice == next(iter(means))
    for name, vector in means.items():
        assert np.allclose(trained.voice(name), vector)
    with pytest.raises(SparqError, match="no voice 'bob': it has s"):
        trained.voice("bob")
    log = (trained.folder.parent / "train.jsonl").read_text().splitlines()
    assert json.loads(log[1])["valid_mel"] > 0
    page = (trained.folder.parent / "listen.html").read_text()
    assert page.count("<audio controls") == 2 * 2
    assert f"<td>{json.loads(log[1])['valid_mel']:.2f}</td>" in page
    assert "recognizer" not in page


def test_a_training_from_before_there_was_a_choice_of_encoders_goes_on(
    trained: Vocoder, recordings: list[Recording]
) -> None:
    identity = [to_mapping(LIGHT), 0, trained.description.units_fingerprint, {}]
    networks = build_networks(LIGHT, num_units=trained.description.num_units, seed=RECIPE.train.seed)
    trainer = Trainer(networks, recordings, RECIPE.train, folder=trained.folder.parent, identity=identity)
    assert trainer.progress.updates == 2


def test_stored_weights_are_the_averaged_ones_in_float16(trained: Vocoder) -> None:
    state = load_file(trained.folder.parent / "checkpoint" / "state.safetensors")
    for name, tensor in trained.networks.state_dict().items():
        assert torch.equal(tensor, state[f"average/{name}"].half().float()), name


def test_another_vocoder_can_start_from_it(trained: Vocoder, run: RunFolder, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, learning_rate=1e-12))
    second = train_vocoder(recipe, run=run, out=tmp_path, start=trained.folder)
    for name, tensor in second.networks.state_dict().items():
        assert torch.allclose(tensor, trained.networks.state_dict()[name], atol=1e-3), name
    assert second.description.training["start"] == trained.description.training
    wider = dataclasses.replace(recipe, light=dataclasses.replace(LIGHT, width=16))
    with pytest.raises(SparqError, match="has another shape than the recipe"):
        train_vocoder(wider, run=run, out=tmp_path / "wider", start=trained.folder)


def test_files_that_do_not_fit_are_refused(trained: Vocoder, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in trained.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    with pytest.raises(SparqError, match="speaks units .*, but the model's are 0123"):
        load_vocoder(trained.folder, units_fingerprint="0123")
    with pytest.raises(SparqError, match=r"has no vocoder\.json; `sparq vocoder train` makes one"):
        load_vocoder(tmp_path)
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SparqError, match="does not hold this vocoder"):
        load_vocoder(cut)
    lacking = copy("lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("generator.pitch.bias")
    save_file(tensors, lacking / "model.safetensors")
    with pytest.raises(SparqError, match=r"Missing key.*pitch\.bias"):
        load_vocoder(lacking)
    old = copy("old")
    write_json(old / "vocoder.json", {**read_json(old / "vocoder.json"), "format": 0})
    with pytest.raises(SparqError, match="not a vocoder description of format 1"):
        load_vocoder(old)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=0", "train.batch is 0: expected more than 0"),
        ("train.ema=1", "train.ema is 1.0: expected a number from 0 to below 1"),
        ("kind=small", "kind"),
        ("light.fft_hop=90", "fft_hop 90 does not divide"),
        ("hifigan.unit_dims=3", "did you mean 'unit_dim'"),
        ("default_voice=bob", "default_voice 'bob' does not speak"),
    ],
)
def test_mistakes_in_a_recipe(override: str, message: str, run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=message):
        train_vocoder(load_vocoder_recipe(None, [override]), run=run, out=tmp_path)


def test_the_papers_recipe_is_the_default_one() -> None:
    path = Path(__file__).resolve().parent.parent / "recipes" / "vocoder" / "hifigan.yaml"
    recipe = load_vocoder_recipe(path)
    assert recipe.generator == HifiGanConfig()
    assert (recipe.train.batch, recipe.train.learning_rate) == (64, 8e-4)
