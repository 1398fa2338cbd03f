"""`sparq train` as a launcher starts it, on two processes, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from small_world import make_backbone, make_corpus, write_recipe
from sparq.cli.main import main
from sparq.training import read_log


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    manifest, backbone = make_corpus(folder / "corpus"), make_backbone(folder / "backbone")
    (folder / "lm.txt").write_text("open the red door\nlamp\n" * 20)
    changes = {"train.accumulate": 2, "train.dropout": 0.0, "train.dtype": "float32"}
    changes |= {"train.extra_text": [str(folder / "lm.txt")], "train.extra_lines": 7}
    return write_recipe(folder / "recipe.yaml", manifest, backbone, frameworks=["vanilla", "softmax1"], **changes)


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    run = recipe.parent / "alone"
    assert main(["run", str(recipe), "--out", str(run), "--until", "train"]) == 0
    return run


def launch(*command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "-m", "sparq", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_make_the_model_of_one(recipe: Path, alone: Path, tmp_path: Path, sharded: bool) -> None:
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--until", "vocab"]) == 0
    environment = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    } if sharded else {}  # fmt: skip
    done = launch("train", str(recipe), "--out", str(tmp_path / "run"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for framework in ("vanilla", "softmax1"):
        logs = [read_log(run / "training" / framework / "train.jsonl") for run in (alone, tmp_path / "run")]
        assert [u.loss for u in logs[1]] == pytest.approx([u.loss for u in logs[0]], abs=1e-4)
        adapters = f"models/{framework}/adapter/adapter_model.safetensors"
        theirs, ours = (load_file(run / adapters) for run in (alone, tmp_path / "run"))
        assert theirs.keys() == ours.keys()
        for name, weight in theirs.items():
            assert (ours[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-4, name
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0  # nothing is left to do


def test_a_mistake_is_said_once_and_ends_all(recipe: Path, tmp_path: Path) -> None:
    """Training needs its units; the second process is told that there is nothing to do."""
    failed = launch("train", str(recipe), "--out", str(tmp_path / "run"))
    assert failed.returncode != 0
    assert failed.stderr.count("sparq: error: train needs units, which is not done") == 1


def test_other_steps_are_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["units", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "2 processes were started, but only `sparq train` shares its work among them" in capsys.readouterr().err
