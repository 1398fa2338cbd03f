"""The choice of a speaker encoder, transformers' x-vectors, and vocoders of such vectors."""

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForAudioXVector,
    HubertConfig,
    HubertModel,
    UniSpeechSatConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

import small_world
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.files import read_json, write_json
from sparq.recipes import speech_out
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.vocoder import load_vocoder_recipe, train_vocoder
from sparq.vocoder import speaker
from sparq.vocoder.ge2e import Ge2eEncoder
from sparq.vocoder.speaker import VOICE_ENCODER, SpeakerEncoder, load_speaker_encoder
from sparq.vocoder.storage import load_vocoder

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "tdnn_dim": [8, 8, 12],
    "tdnn_kernel": [5, 3, 1], "tdnn_dilation": [1, 2, 1], "xvector_output_dim": 6,
}  # fmt: skip
CONFIGS = {"wavlm": WavLMConfig, "wav2vec2": Wav2Vec2Config, "unispeech-sat": UniSpeechSatConfig}


def save_xvector(folder: Path, kind: str = "wavlm", *, seed: int = 0, **changes: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForAudioXVector.from_config(CONFIGS[kind](**SHAPE, **changes)).eval()
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return model


def speech(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(n) + 0.05 * np.sin(np.arange(n) / 9)).astype(np.float32) for n in lengths]


# The reference


def test_the_built_in_encoder_is_the_default() -> None:
    assert isinstance(Ge2eEncoder(), SpeakerEncoder)
    vocoder = load_vocoder(Path(str(files("sparq") / "demo" / "vocoder")))
    assert "speaker_encoder_reference" not in read_json(vocoder.folder / "vocoder.json")
    assert vocoder.description.speaker_encoder_reference == VOICE_ENCODER
    assert load_vocoder_recipe(None).speaker_encoder == VOICE_ENCODER


@pytest.mark.pretrained
def test_the_shipped_vocoder_knows_the_built_in_encoder(voice_encoder_folder: Path) -> None:
    encoder = load_speaker_encoder(cache=voice_encoder_folder.parent)
    assert (encoder.fingerprint, encoder.dim) == ("d7c758d7cea0568e", 256)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/place", "no speaker encoder '/no/such/place': no such folder; expected pretrained:voice-encoder"),
        ("pretrained:voice-encodr", "no speaker encoder 'pretrained:voice-encodr': Repo id must use"),
        (
            "{empty}",
            r"holds no speaker encoder: expected embedding_model\.safetensors, embedding_model\.ckpt or config",
        ),
        (
            "{hubert}",
            "unknown kind of speaker encoder at '.*': 'hubert': valid: unispeech-sat, wav2vec2, wavlm|wav2vec2",
        ),
    ],
)
def test_references_that_are_no_speaker_encoder(reference: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    HubertModel(HubertConfig(**{k: v for k, v in SHAPE.items() if not k.startswith(("tdnn", "xv"))})).save_pretrained(
        tmp_path / "hubert"
    )
    with pytest.raises(SparqError, match=message):
        load_speaker_encoder(reference.format(empty=tmp_path / "empty", hubert=tmp_path / "hubert"))


def test_of_a_hub_name_only_tensors_and_configs_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_xvector(tmp_path)
    asked = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(speaker, "snapshot_download", snapshot_download)
    assert load_speaker_encoder("someone/speakers").dim == 6
    (patterns,) = asked.values()
    assert not any(pattern.endswith((".yaml", ".py", ".bin")) or pattern == "*" for pattern in patterns)


# Transformers


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_are_those_of_transformers(kind: str, weighted: bool, tmp_path: Path) -> None:
    model = save_xvector(tmp_path, kind, use_weighted_layer_sum=weighted)
    encoder = load_speaker_encoder(str(tmp_path))
    assert isinstance(encoder, SpeakerEncoder)
    clips = speech(16_000, 7_000, 24_321, 9_999)
    vectors = encoder.embed(clips)
    assert vectors.shape == (4, encoder.dim) == (4, 6)
    for clip, vector in zip(clips, vectors, strict=True):
        values = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
        with torch.no_grad():
            expected = model(torch.from_numpy(values)[None]).embeddings[0].numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
        np.testing.assert_allclose(vector, encoder.embed([clip])[0], atol=1e-6)


def test_a_clip_that_is_too_short_is_repeated(tmp_path: Path) -> None:
    save_xvector(tmp_path)
    encoder = load_speaker_encoder(str(tmp_path))
    # Kernels of 5 and 3, the latter dilated by 2, need nine frames, and the deviation a tenth: 9 * 320 + 400 samples.
    whole, short = speech(3_280, 1_000)
    expected = encoder.embed([np.tile(short, 4)[:3_280], whole])
    np.testing.assert_array_equal(encoder.embed([short, whole]), expected)
    assert np.linalg.norm(encoder.embed(speech(1, 320, 3_279)), axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("tdnn.0.kernel.bias"), "lacks 1 tensors of a wavlm encoder, e.g. 'tdnn.0.kernel.bias'"),
        (lambda t: t.update(odd=torch.zeros(2)), "has unknown 1 tensors of a wavlm encoder, e.g. 'odd'"),
        (lambda t: t.update({"projector.bias": torch.zeros(3)}), "cannot load the weights"),
    ],
)
def test_transformers_tensors_must_all_fit(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    save_xvector(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparqError, match=message):
        load_speaker_encoder(str(tmp_path))


def test_the_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    model = save_xvector(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = load_speaker_encoder(str(tmp_path / "a")).fingerprint
    assert load_speaker_encoder(str(tmp_path / "b")).fingerprint == first
    with torch.no_grad():
        model.feature_extractor.bias[0] += 1
    model.save_pretrained(tmp_path / "b")
    assert load_speaker_encoder(str(tmp_path / "b")).fingerprint != first


# A vocoder of such vectors


SETTINGS = [
    "light.width=12", "light.num_blocks=1", "train.updates=1", "train.batch=2", "train.frames=8",
    "validate_utterances=0", "train.adversarial_from=9", "default_voice=s1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run/` up to its units, `speakers/`, and a vocoder of the vectors that these make."""
    folder = tmp_path_factory.mktemp("world")
    manifest = small_world.make_corpus(folder / "corpus")
    recipe = small_world.write_recipe(folder / "recipe.yaml", manifest, folder / "no-backbone-needed")
    assert main(["run", str(recipe), "--until", "units", "--out", str(folder / "run")]) == 0
    save_xvector(folder / "speakers")
    (folder / "vocoder.yaml").write_text("speaker_encoder: ./speakers\nlight: {speaker_dim: 6}\n")
    changes = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["vocoder", "train", str(folder / "run"), "--recipe", str(folder / "vocoder.yaml"), *changes]
    assert main([*command, "--out", str(folder / "trained")]) == 0
    return folder


def test_a_vocoder_is_trained_on_them_and_says_so(world: Path) -> None:
    vocoder = load_vocoder(world / "trained" / "vocoder")
    encoder = load_speaker_encoder(str(world / "speakers"))
    assert vocoder.description.speaker_encoder == encoder.fingerprint
    # Relative to the recipe's folder there, and absolute here.
    assert vocoder.description.speaker_encoder_reference == str(world / "speakers")
    assert vocoder.voices.shape == (3, 6)
    np.testing.assert_allclose(np.linalg.norm(vocoder.voices, axis=1), 1, atol=1e-5)
    stored = load_file(world / "trained" / "vocoder" / "model.safetensors")
    assert stored["generator.speaker.weight"].shape == (12, 6)


def test_a_recording_is_heard_by_the_encoder_of_its_vocoder(world: Path, tmp_path: Path) -> None:
    vocoder = load_vocoder(world / "trained" / "vocoder")
    recording = world / "corpus" / "2.wav"
    vector = speech_out.speaker_vector(vocoder, recording)
    waveform = speech_out.read_waveform(recording)
    np.testing.assert_array_equal(vector, load_speaker_encoder(str(world / "speakers")).embed([waveform])[0])
    command = ["resynthesize", str(recording), "--vocoder", str(vocoder.folder), "--out"]
    assert main([*command, str(tmp_path / "own")]) == 0
    assert main([*command, str(tmp_path / "other"), "--voice", str(world / "corpus" / "3.wav")]) == 0
    assert len({(tmp_path / name / "2.wav").read_bytes() for name in ("own", "other")}) == 2


def test_an_encoder_that_changed_or_is_gone_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "trained" / "vocoder", tmp_path / "vocoder")
    description = tmp_path / "vocoder" / "vocoder.json"
    content = read_json(description)
    save_xvector(tmp_path / "other", seed=1)
    shutil.copytree(world / "speakers", tmp_path / "moved")
    command = ["resynthesize", str(world / "corpus" / "2.wav"), "--vocoder", str(tmp_path / "vocoder")]
    voice = ["--voice", str(world / "corpus" / "3.wav")]
    cases = {
        "other": f"is at hand as {tmp_path / 'other'}: take one of its own voices",
        "gone": f"'{tmp_path / 'gone'}': no such folder; ",
        "moved": None,
    }
    for name, message in cases.items():
        write_json(description, {**content, "speaker_encoder_reference": str(tmp_path / name)})
        for given in ([], voice):
            out = tmp_path / f"{name}{len(given)}"
            assert main([*command, *given, "--out", str(out)]) == (0 if message is None else 2)
            assert (out / "2.wav").exists() == (message is None)
            assert message is None or message in capsys.readouterr().err
    write_json(description, {**content, "speaker_encoder_reference": "/gone"})
    vocoder = load_vocoder(description.parent)
    with pytest.raises(SparqError, match=rf"; {description} names it"):
        speech_out.speaker_vector(vocoder, world / "corpus" / "1.wav")


def test_the_generator_must_take_vectors_of_that_length(world: Path, tmp_path: Path) -> None:
    for kind in ("light", "hifigan"):
        recipe = load_vocoder_recipe(None, [f"kind={kind}", f"speaker_encoder={world / 'speakers'}"])
        message = rf"{kind}\.speaker_dim is 256: expected 6, the length of the vectors of {world / 'speakers'}"
        with pytest.raises(SparqError, match=message):
            train_vocoder(recipe, run=RunFolder(world / "run"), out=tmp_path)


def test_trainings_of_two_encoders_are_not_mixed(world: Path, tmp_path: Path) -> None:
    save_xvector(tmp_path / "other", seed=1)
    settings = [*SETTINGS, "light.speaker_dim=6"]
    same, other = (
        load_vocoder_recipe(None, [*settings, f"speaker_encoder={folder}"])
        for folder in (world / "speakers", tmp_path / "other")
    )
    run, start = RunFolder(world / "run"), world / "trained" / "vocoder"
    assert train_vocoder(same, run=run, out=tmp_path / "new", start=start).description.training["start"]
    with pytest.raises(SparqError, match="start from one of the same encoder"):
        train_vocoder(other, run=run, out=tmp_path / "newer", start=start)
    shutil.copytree(world / "trained", tmp_path / "trained")
    train_vocoder(same, run=run, out=tmp_path / "trained")  # goes on, and has nothing to do
    assert len((tmp_path / "trained" / "train.jsonl").read_text().splitlines()) == 1
    with pytest.raises(SparqError, match="training with other settings or data"):
        train_vocoder(other, run=run, out=tmp_path / "trained")
