"""kill -9 at random moments of the whole job: the same units, vocabulary and losses as without."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import small_world

KILLS = int(os.environ.get("SPARQ_TEST_KILLS", "3"))
"""CONTRIBUTING.md asks for ten by hand; each costs a start of the interpreter."""


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "sparq", "run", str(recipe), "--out", str(out), "--until", "train"]


def digest(run: Path) -> dict[str, bytes]:
    files = [*run.glob("units/**/*"), *run.glob("vocab/*"), run / "manifest.tsv"]
    return {str(f.relative_to(run)): f.read_bytes() for f in files if f.is_file()}


def losses(run: Path) -> list[float]:
    lines = (run / "training" / "softmax1" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_killed_at_random_ends_as_one_that_was_not(tmp_path: Path) -> None:
    manifest = small_world.make_corpus(tmp_path / "corpus")
    backbone = small_world.make_backbone(tmp_path / "backbone")
    recipe = small_world.write_recipe(
        tmp_path / "recipe.yaml", manifest, backbone, frameworks=["softmax1"], threads=1,
        **{"train.updates": 60, "train.dropout": 0.1, "train.checkpoint_updates": 5},
    )  # fmt: skip
    start = time.monotonic()
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - start
    random.seed(0)
    killed = 0
    while killed < KILLS:
        process = subprocess.Popen(
            command(recipe, tmp_path / "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # The first third is the start of the interpreter, where there is nothing to lose.
            process.wait(timeout=seconds * random.uniform(0.35, 0.95))
            # Too late: the machine was slower before.
            seconds *= 0.7
            shutil.rmtree(tmp_path / "cut")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed
    subprocess.run(command(recipe, tmp_path / "cut"), check=True, capture_output=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    adapters = [
        r / "models" / "softmax1" / "adapter" / "adapter_model.safetensors"
        for r in (tmp_path / "cut", tmp_path / "whole")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
