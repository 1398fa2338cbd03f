"""Features against transformers' own hidden states, slow references and each other."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.fft import dct
from transformers import (
    BertConfig,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from sparq.errors import SparqError
from sparq.units.features import FeatureSpec, load_extractor

SSL_SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 7, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
SSL_CLASSES = {
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "wavlm": (WavLMConfig, WavLMModel),
}
SSL_CASES = [
    ("hubert", {}), ("hubert", LARGE), ("hubert", {"conv_pos_batch_norm": True}), ("wav2vec2", {}),
    ("wav2vec2", LARGE | {"add_adapter": True}), ("wavlm", {}), ("wavlm", LARGE),
]  # fmt: skip


def speech(*lengths: int) -> list[np.ndarray]:
    """Noise of changing loudness, so that a normalization over time matters."""
    generator = np.random.default_rng(5)
    return [(generator.normal(size=n) * np.linspace(0.01, 0.3, n) + 0.02).astype(np.float32) for n in lengths]


def save_ssl(folder: Path, kind: str, changes: dict[str, object], *, normalize: bool = True) -> torch.nn.Module:
    config_class, model_class = SSL_CLASSES[kind]
    model = model_class(config_class(**SSL_SHAPE | changes)).eval()
    with torch.no_grad():  # defaults of 0 and 1 hide mistakes
        for name, value in model.named_parameters():
            if "norm" in name and "original" not in name:
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    return model


def save_whisper(folder: Path) -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        d_model=16, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, num_mel_bins=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "changes"), SSL_CASES)
def test_layer_6_is_transformers_hidden_state_6(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    model = save_ssl(tmp_path, kind, changes)
    (waveform,) = speech(12_345)
    values = Wav2Vec2FeatureExtractor(do_normalize=True)(
        waveform, sampling_rate=16_000, return_tensors="pt"
    ).input_values
    with torch.no_grad():
        hidden = model(values, output_hidden_states=True).hidden_states

    extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=6, dtype="float32"))
    (features,) = extractor.extract([waveform])

    assert len(hidden) == 8
    np.testing.assert_allclose(features, hidden[6][0].numpy(), atol=1e-4)
    assert np.abs(features - hidden[5][0].numpy()).max() > 1e-2
    assert np.abs(features - hidden[7][0].numpy()).max() > 1e-2
    assert (extractor.dim, extractor.frame_rate) == (24, 50.0)


@pytest.mark.parametrize(("kind", "changes"), SSL_CASES)
def test_features_do_not_depend_on_the_batch(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    save_ssl(tmp_path, kind, changes)
    extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=2, dtype="float32"))
    clips = speech(16_000, 399, 7_000, 400, 24_321, 7_001, 0)
    together = extractor.extract(clips)
    assert [len(f) for f in together] == [max(0, (len(c) - 400) // 320 + 1) for c in clips]
    for clip, features in zip(clips, together, strict=True):
        np.testing.assert_allclose(features, extractor.extract([clip])[0], atol=1e-4)


def test_long_clips_are_cut_on_the_frame_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ssl(tmp_path, "hubert", LARGE, normalize=False)
    extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=1, dtype="float32"))
    (clip,) = speech(40_000)
    whole = extractor.extract([clip])[0]
    monkeypatch.setattr("sparq.units.hubert._LONGEST", 1.0)
    cut = extractor.extract([clip])[0]  # 124 frames: three pieces of 41 or 42
    assert cut.shape == whole.shape
    expected = extractor.extract([clip[41 * 320 : 81 * 320 + 400]])[0]
    np.testing.assert_allclose(cut[41:82], expected, atol=1e-5)


def test_checkpoints_with_a_head_and_old_names_load(tmp_path: Path) -> None:
    config = Wav2Vec2Config(**SSL_SHAPE, vocab_size=8)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    spec = FeatureSpec(model=str(tmp_path), layer=3, dtype="float32")
    modern = load_extractor(spec)

    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("wav2vec2.") for name in weights)
    renames = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    old = dict(weights)
    for new_name, old_name in renames.items():
        for name in [n for n in old if n.endswith(new_name)]:
            old[name.replace(new_name, old_name)] = old.pop(name)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_extractor(spec).fingerprint == modern.fingerprint


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("encoder.layers.1.attention.k_proj.weight", None, "lacks 1 tensors of a hubert encoder"),
        (None, "encoder.layers.1.attention.gate.weight", "has unknown 1 tensors of a hubert encoder"),
        ("encoder.layers.5.attention.k_proj.weight", "encoder.layers.6.odd", None),  # above layer 2: not used
    ],
)
def test_loading_is_strict_in_the_part_used(
    tmp_path: Path, drop: str | None, add: str | None, message: str | None
) -> None:
    save_ssl(tmp_path, "hubert", {})
    weights = load_file(tmp_path / "model.safetensors")
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = FeatureSpec(model=str(tmp_path), layer=2)
    if message is None:
        load_extractor(spec)
        return
    with pytest.raises(SparqError, match=message):
        load_extractor(spec)


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_whisper(tmp_path)
    capfd.readouterr()
    load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    assert capfd.readouterr() == ("", "")


def test_fingerprint_names_the_values_not_the_place(tmp_path: Path) -> None:
    model = save_whisper(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")  # several files
    WhisperFeatureExtractor(feature_size=20).save_pretrained(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    first = load_extractor(FeatureSpec(model=str(tmp_path / "a"), layer=2)).fingerprint
    assert load_extractor(FeatureSpec(model=str(tmp_path / "b"), layer=2)).fingerprint == first
    assert first["kind"] == "whisper"
    assert str(tmp_path) not in str(first)
    others = [
        FeatureSpec(model=str(tmp_path / "a"), layer=1),
        FeatureSpec(model=str(tmp_path / "a"), layer=2, dtype="float32"),
    ]
    assert all(load_extractor(spec).fingerprint != first for spec in others)
    with torch.no_grad():
        model.model.encoder.layers[1].fc1.bias[0] += 1
    model.save_pretrained(tmp_path / "a")
    assert load_extractor(FeatureSpec(model=str(tmp_path / "a"), layer=2)).fingerprint != first


def whisper_alone(piece: np.ndarray, model: WhisperForConditionalGeneration, layer: int) -> np.ndarray:
    """Slow: one clip with its silence through transformers' modules, without padding, batch or mask."""
    encoder = model.get_encoder()
    frames = -(-len(piece) // 320)
    samples = np.zeros((frames + 17) * 320, np.float32)
    samples[320 : 320 + len(piece)] = piece
    mel = WhisperFeatureExtractor(feature_size=20)(
        samples, sampling_rate=16_000, max_length=len(samples), return_tensors="pt"
    ).input_features
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(mel))))
        hidden = hidden[0].T[None, 1 : 1 + frames + 15]
        hidden = hidden + encoder.embed_positions.weight[: frames + 15]
        for module in encoder.layers[:layer]:
            hidden = module(hidden, None)
    return hidden[0, :frames].numpy()


def test_whisper_encodes_each_clip_by_itself(tmp_path: Path) -> None:
    model = save_whisper(tmp_path)
    extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=2, dtype="float32"))
    clips = speech(100_001, 960_320, 16_000, 475_200, 1)
    features = extractor.extract(clips)
    assert [len(f) for f in features] == [-(-len(c) // 320) for c in clips]
    assert (extractor.dim, extractor.frame_rate) == (16, 50.0)
    for index in (0, 2, 3, 4):
        alone = whisper_alone(clips[index], model, layer=2)
        np.testing.assert_allclose(features[index], alone, atol=1e-4)
    bounds = [0, 1000 * 320, 2000 * 320, len(clips[1])]  # 3001 frames: three pieces
    pieces = [whisper_alone(clips[1][a:b], model, layer=2) for a, b in pairwise(bounds)]
    np.testing.assert_allclose(features[1], np.concatenate(pieces), atol=1e-4)


def test_whisper_truncation_is_transformers_hidden_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A window that is all speech, and no silence behind it: what transformers computes, in every layer.
    model = save_whisper(tmp_path)
    monkeypatch.setattr("sparq.units.whisper._TAIL", 0)
    (clip,) = speech(480_000)
    clip[:320] = clip[-640:] = 0  # transformers' edges are reflected, ours are silent
    mel = WhisperFeatureExtractor(feature_size=20)(clip, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        output = model.get_encoder()(mel, output_hidden_states=True)
    for layer in (1, 2, 3):
        extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=layer, dtype="float32"))
        features = torch.from_numpy(extractor.extract([clip])[0])
        if layer < 3:
            expected = output.hidden_states[layer][0]
        else:  # the last hidden state of transformers is behind the final norm, ours is not
            expected, features = (
                output.last_hidden_state[0],
                model.get_encoder().layer_norm(features).detach(),
            )
        # The zero-padding of the convolutions at the outermost frames is spread by attention, but thinly.
        np.testing.assert_allclose(features[2:-2].numpy(), expected[2:-2].numpy(), atol=5e-3)


def test_whisper_without_clips_or_samples(tmp_path: Path) -> None:
    save_whisper(tmp_path)
    extractor = load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    assert extractor.extract([]) == []
    assert extractor.extract(speech(0))[0].shape == (0, 16)


@pytest.mark.pretrained
def test_real_whisper_in_bfloat16_is_near_float32(whisper_folder: Path) -> None:
    clips = speech(50_000, 90_000)
    exact, fast = (
        load_extractor(FeatureSpec(model=str(whisper_folder), layer=2, dtype=dtype)).extract(clips)
        for dtype in ("float32", "bfloat16")
    )
    for a, b in zip(exact, fast, strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


def slow_mfcc(samples: np.ndarray) -> np.ndarray:
    count = -(-len(samples) // 320)
    padded = np.pad(samples, (40, (count - 1) * 320 + 360 - len(samples)))
    filters = mel_filter_bank(257, 23, 20.0, 8000.0, 16_000, mel_scale="kaldi", triangularize_in_mel_space=True)
    log_mel = spectrogram(
        padded, window_function(400, "hamming", periodic=False), frame_length=400, hop_length=320,
        fft_length=512, power=2.0, center=False, preemphasis=0.97, mel_filters=filters, mel_floor=1e-10,
        log_mel="log", remove_dc_offset=True,
    )  # fmt: skip
    cepstra = dct(log_mel.T, type=2, norm="ortho")[:, :13]
    blocks = [cepstra]
    for _ in range(2):
        edge = np.pad(blocks[-1], ((2, 2), (0, 0)), mode="edge")
        rows = [(edge[t + 3] - edge[t + 1] + 2 * (edge[t + 4] - edge[t])) / 10 for t in range(count)]
        blocks.append(np.stack(rows))
    return np.concatenate(blocks, axis=1)


@pytest.mark.parametrize("length", [1, 320, 321, 8_000, 12_345])
def test_mfcc_is_the_slow_formula(length: int) -> None:
    extractor = load_extractor(FeatureSpec(model="mfcc"))
    (clip,) = speech(length)
    clip = clip + 0.1  # an offset must not matter, except at the padded edges
    features = extractor.extract([clip])[0]
    assert features.shape == (-(-length // 320), 39)
    if length > 1:
        np.testing.assert_allclose(features, slow_mfcc(clip), atol=2e-3)


def test_mfcc_does_not_depend_on_the_batch() -> None:
    extractor = load_extractor(FeatureSpec(model="mfcc"))
    clips = speech(5_000, 0, 9_000)
    assert [len(f) for f in extractor.extract(clips)] == [16, 0, 29]
    np.testing.assert_array_equal(extractor.extract(clips)[2], extractor.extract(clips[2:])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mfcc", "layer": 2}, "layer 2 of mfcc does not exist"),
        ({"model": "somewhere/hubert"}, "no layer given"),
        ({"model": "mfcc", "dtype": "float23"}, "unknown feature dtype 'float23': did you mean 'float32'"),
    ],
)
def test_wrong_specs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        FeatureSpec(**arguments)


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=r"no model at '.*nowhere': expected a Hugging Face folder"):
        load_extractor(FeatureSpec(model=str(tmp_path / "nowhere"), layer=1))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(SparqError, match=r"unknown kind of feature model .*'bert': did you mean 'hubert'"):
        load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    save_whisper(tmp_path)
    for layer in (0, 4):
        with pytest.raises(SparqError, match=rf"layer {layer} of .* does not exist: valid are 1 to 3"):
            load_extractor(FeatureSpec(model=str(tmp_path), layer=layer))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(SparqError, match=r"cannot read preprocessor_config.json"):
        load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(SparqError, match=r"cannot load the weights of .*") as truncated:
        load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")  # nothing is unpickled
    with pytest.raises(SparqError, match=r"cannot load the weights of .*safetensors") as pickled:
        load_extractor(FeatureSpec(model=str(tmp_path), layer=1))
    assert "\n" not in f"{truncated.value}{pickled.value}"
