"""The distance of what two sounds say, against transformers' own Whisper."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import vocoder_worker
from sparq.errors import SparqError
from sparq.vocoder.config import LightConfig
from sparq.vocoder.content import ContentDistance, whisper_log_mel
from sparq.vocoder.training import Trainer
from sparq.vocoder.voice import build_networks
from test_features import save_ssl, save_whisper


@pytest.fixture
def whisper(tmp_path: Path) -> tuple[Path, WhisperForConditionalGeneration]:
    return tmp_path / "whisper", save_whisper(tmp_path / "whisper")


def test_log_mel_is_whispers() -> None:
    samples = np.random.default_rng(0).normal(size=(2, 8000)).astype(np.float32) * 0.1
    samples[0, 4000:] = 0  # silence, which the floor is for
    for num_mels in (80, 20):
        # One by one: the floor is below the maximum of a clip, not of all.
        expected = [
            WhisperFeatureExtractor(feature_size=num_mels)(
                row, sampling_rate=16_000, max_length=8000, return_tensors="pt"
            ).input_features[0]
            for row in samples
        ]
        torch.testing.assert_close(
            whisper_log_mel(torch.from_numpy(samples), num_mels), torch.stack(expected), atol=1e-4, rtol=0
        )


def test_layers_are_transformers_hidden_states(whisper: tuple[Path, WhisperForConditionalGeneration]) -> None:
    folder, model = whisper
    encoder = model.model.encoder
    samples = torch.randn(2, 2 * 160 * encoder.config.max_source_positions, generator=torch.Generator().manual_seed(0))
    mel = whisper_log_mel(samples, encoder.config.num_mel_bins)
    with torch.no_grad():
        expected = encoder(mel, output_hidden_states=True).hidden_states
        found = ContentDistance(str(folder)).layers(samples)
    assert len(found) == encoder.config.encoder_layers
    for i, layer in enumerate(found[:-1]):  # transformers gives the last one behind the final norm
        torch.testing.assert_close(layer, expected[i + 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.layer_norm(found[-1]), expected[-1], atol=1e-4, rtol=1e-4)


def test_the_distance_and_its_gradient(whisper: tuple[Path, WhisperForConditionalGeneration]) -> None:
    distance = ContentDistance(str(whisper[0]))
    random = torch.Generator().manual_seed(1)
    real = torch.randn(2, 3200, generator=random)
    noise = torch.randn(2, 3200, generator=random)
    assert float(distance(real, real)) == 0
    values = []
    for size in (0.01, 0.1, 1.0):
        made = (real + size * noise).requires_grad_()
        loss = distance(made, real)
        loss.backward()
        values.append(loss.item())
        assert made.grad is not None
        assert made.grad.abs().sum() > 0
    assert values == sorted(values)
    assert all(p.grad is None for p in distance.parameters())


def test_training_by_it(whisper: tuple[Path, WhisperForConditionalGeneration], tmp_path: Path) -> None:
    recordings = vocoder_worker.make_recordings(tmp_path)
    settings = dataclasses.replace(
        vocoder_worker.SETTINGS, updates=30, learning_rate=1e-2, adversarial_from=1000, mel_weight=0.0,
        content_weight=1.0, content_model=str(whisper[0]), dtype="bfloat16",
    )  # fmt: skip
    networks = build_networks(LightConfig(width=12, num_blocks=1), num_units=vocoder_worker.NUM_UNITS, seed=0)
    trainer = Trainer(networks, recordings, settings, folder=tmp_path / "out", identity="")
    seen: list[float] = []
    update = trainer._update
    trainer._update = lambda batch: seen.append((losses := update(batch))["content"]) or losses  # type: ignore[method-assign, func-returns-value]
    trainer.train("content")
    assert np.mean(seen[-5:]) < 0.9 * np.mean(seen[:5])


def test_another_kind_of_encoder_is_refused(tmp_path: Path) -> None:
    save_ssl(tmp_path / "hubert", "hubert", {})
    with pytest.raises(SparqError, match=r"train.content_model .* is of the kind hubert: expected a whisper"):
        ContentDistance(str(tmp_path / "hubert"))
