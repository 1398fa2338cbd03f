"""One process of a tiny vocoder's training: `torchrun --nproc-per-node 2 tests/vocoder_worker.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from sparq.recipes.train_together import leave
from sparq.vocoder.analysis import Recording
from sparq.vocoder.config import FRAME_HOP, LightConfig
from sparq.vocoder.settings import TrainSettings
from sparq.vocoder.training import Trainer
from sparq.vocoder.voice import build_networks

FRAMES, NUM_UNITS = 12, 8
# The spectral distance is a ratio of norms over the whole batch, no mean over its pieces, so it is left out.
SETTINGS = TrainSettings(
    updates=4, batch=4, frames=8, learning_rate=1e-3, mel_weight=1.0, spectral_weight=0.0, adversarial_from=1,
    checkpoint_updates=2, validate_updates=2, ema=0.9,
)  # fmt: skip


def make_recordings(folder: Path) -> list[Recording]:
    """Return six tones, all voiced and with as many runs of units, so that every mean over pieces is one of means."""
    recordings = []
    for index in range(6):
        random = np.random.default_rng(index)
        path = folder / f"{index}.wav"
        if not path.exists():
            time = np.arange(FRAMES * FRAME_HOP) / 16_000
            soundfile.write(path, 0.3 * np.sin(2 * np.pi * (150 + 20 * index) * time), 16_000, subtype="FLOAT")
        recordings.append(
            Recording(
                id=str(index), path=path, speaker="s", text="",
                units=np.arange(FRAMES).astype(np.uint16) % NUM_UNITS,
                hertz=np.full(FRAMES, 150 + 20 * index, np.float32), voiced=np.ones(FRAMES, bool),
                vector=random.normal(size=256).astype(np.float32),
            )
        )  # fmt: skip
    return recordings


def make_trainer(recordings: Path, folder: Path) -> Trainer:
    """Return the training that one process and several do alike."""
    networks = build_networks(LightConfig(width=12, expansion=2, num_blocks=1, kernel=3), num_units=NUM_UNITS, seed=0)
    return Trainer(
        networks, make_recordings(recordings), SETTINGS, folder=folder, identity="test",
        validate=lambda _: {"valid_mel": 1.0},
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(Path(sys.argv[1]), Path(sys.argv[2])).train("test", seconds=1e9)
    leave()
