"""Trainings in two processes with gloo, replicated and sharded, equal those in one."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from sparq.adaptation import LoraSettings, add_lora
from sparq.errors import SparqError
from sparq.models import convert
from sparq.training import TrainingRun, TrainingSettings, read_log
from sparq.training.parallel import Workers
from test_training import SETTINGS, fresh, full, packed_stream


def sink_and_adapters() -> nn.Module:
    model = convert(full(), "learned_sink", replace=True)
    return add_lora(model, LoraSettings(rank=4, alpha=8, dropout=0.0))


KINDS: dict[str, tuple[Callable[[], nn.Module], TrainingSettings]] = {
    "lora": (fresh, SETTINGS),
    "full": (full, SETTINGS),
    "schedule": (full, dataclasses.replace(SETTINGS, sink_updates=4)),
    "penalties": (sink_and_adapters, dataclasses.replace(SETTINGS, kurtosis_weight=0.1, max_norm_weight=0.01)),
}
"""Models and settings: `schedule` raises the sink of softmax1, `penalties` trains sinks against outliers."""


def training_of(kind: str, folder: Path) -> TrainingRun:
    make, settings = KINDS[kind]
    return TrainingRun(
        make(), folder, settings=settings, key="key", batches=packed_stream,
        validation={"asr": [next(packed_stream(1000))]},
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainingRun]:
    training = training_of(request.param, tmp_path_factory.mktemp("single"))
    training.train("test")
    return request.param, training


def launch(folder: Path, kind: str, *options: str, **environment: str) -> None:
    """Two processes of a training, as a user starts them."""
    launch_script(Path(__file__).with_name("train_workers.py"), str(folder), kind, options=options, **environment)


def launch_script(script: Path, *arguments: str, options: Sequence[str] = (), **environment: str) -> None:
    """Two processes with gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    run = subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def same_run(single: TrainingRun, folder: Path) -> None:
    """Losses, accuracies and weights agree to 1e-4."""
    log = read_log(folder / "train.jsonl")
    assert [u.loss for u in log] == pytest.approx([u.loss for u in single.log], abs=1e-4)
    assert [u.valid_nll for u in log] == pytest.approx([u.valid_nll for u in single.log], abs=1e-4)
    assert [u.tokens for u in log] == [u.tokens for u in single.log]
    mine = load_file(folder / "checkpoint" / "state.safetensors")
    theirs = load_file(single.folder / "checkpoint" / "state.safetensors")
    for name in theirs:
        if name.startswith("weight/"):
            assert (mine[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-4, name


def test_two_processes_equal_one(single: tuple[str, TrainingRun], tmp_path: Path) -> None:
    launch(tmp_path, single[0])
    same_run(single[1], tmp_path)


def test_two_processes_with_a_sharded_model_equal_one(single: tuple[str, TrainingRun], tmp_path: Path) -> None:
    launch(
        tmp_path, single[0], ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
    )  # fmt: skip
    same_run(single[1], tmp_path)


def test_a_killed_process_is_restarted_and_nothing_is_lost(single: tuple[str, TrainingRun], tmp_path: Path) -> None:
    # Without this PyTorch 2.13 keeps the addresses of the first attempt in one store with those of the second.
    launch(tmp_path, single[0], "--max-restarts", "1", KILL_AT="4", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert (tmp_path / "killed").exists()
    same_run(single[1], tmp_path)


def test_leaving_right_behind_a_collective_does_not_stop(tmp_path: Path) -> None:
    launch_script(Path(__file__).with_name("leave_workers.py"), str(tmp_path))


def test_what_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(SparqError, match=r"train.accumulate is 40, which 3 processes cannot share: .* 42 say"):
        Workers(accumulate=40)
