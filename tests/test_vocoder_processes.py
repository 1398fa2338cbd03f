"""A vocoder's training in two processes with gloo equals that in one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import vocoder_worker
from sparq.errors import SparqError
from sparq.vocoder.config import LightConfig
from sparq.vocoder.training import Trainer
from sparq.vocoder.voice import build_networks
from test_processes import launch_script


def test_two_processes_equal_one(tmp_path: Path) -> None:
    single = vocoder_worker.make_trainer(tmp_path, tmp_path / "one")
    single.train("one")
    launch_script(Path(vocoder_worker.__file__), str(tmp_path), str(tmp_path / "two"))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [r["update"] for r in logs[1]] == [1, 2, 3, 4]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    states = [load_file(tmp_path / name / "checkpoint" / "state.safetensors") for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        if name.startswith(("network/", "average/", "critics/")):
            assert torch.allclose(tensor, states[1][name], atol=1e-4, rtol=1e-3), name


def test_pieces_that_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = build_networks(LightConfig(width=12, num_blocks=1), num_units=8, seed=0)
    settings = dataclasses.replace(vocoder_worker.SETTINGS, batch=5)
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(SparqError, match=r"train.batch is 5, which 2 processes cannot share: .* multiple of 2, 6 say"):
        Trainer(networks, vocoder_worker.make_recordings(tmp_path), settings, folder=tmp_path, identity="")


def test_beside_a_training_of_another_precision(tmp_path: Path) -> None:
    """Accelerate keeps one precision for a process; a vocoder has its own."""
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16", cpu=True)
    try:
        trainer = vocoder_worker.make_trainer(tmp_path, tmp_path / "out")
        assert not trainer._autocast()._enabled
    finally:
        AcceleratorState._reset_state()
