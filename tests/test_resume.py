"""Kills and interrupts anywhere: the same command goes on and ends with the same files."""

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

import fake_pipeline
from fake_pipeline import DONE, NUM_SHARDS, STEPS, child, contents, kill_after, states
from sparq.recipes.recipe import Recipe, load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import run_steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fake_pipeline.write_recipe(tmp_path)


@pytest.fixture
def recipe(file: Path) -> Recipe:
    return load_recipe(file)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_kill_9_anywhere_and_resume(file: Path, recipe: Recipe, run: RunFolder) -> None:
    """Ten kills at random places: each piece of work is done once, or once more where it was hit."""
    whole = RunFolder(run.path.parent / "whole")
    expected = subprocess.run(
        child("run", file, "--out", whole.path), capture_output=True, text=True, check=True
    ).stdout.split("\n")
    random_lines = random.Random(0)
    lines: list[str] = []
    for _ in range(10):
        printed = kill_after(child("run", file, "--out", run.path), random_lines.randint(1, 4))
        lines += printed
        for path in run.path.rglob("*.json"):  # whatever is there is whole
            if ".partial" not in path.name:
                json.loads(path.read_text())
        for name, state in states(run).items():
            stamp = run.stamp(name)
            assert stamp is not None
            assert (state == "done") == (stamp.finished is not None)
            if state == "done":
                assert run.is_done(name, stamp.key)
    final = subprocess.run(child("run", file, "--out", run.path), capture_output=True, text=True, check=True)
    lines += final.stdout.split("\n")
    assert contents(run) == contents(whole)
    assert states(run) == DONE
    # What announces the work before it is done: a kill may fall between the work and the word that it is.
    work = [line for line in expected if line and "/" not in line and not line.endswith(" written")]
    assert set(work) <= set(lines)
    assert sum(lines.count(line) - 1 for line in work) <= 10


@pytest.mark.parametrize("num_renames", range(8))
def test_kill_while_overwriting(file: Path, recipe: Recipe, run: RunFolder, num_renames: int) -> None:
    """Whatever was removed when the kill came, the next run ends as if nothing had happened."""
    run_steps(recipe, run, STEPS)
    changed = load_recipe(file, ["units.k=100"])
    cut = f"""
import os, pathlib
real, left = pathlib.Path.replace, [{num_renames}]
def replace(path, target):
    left[0] -= 1
    return os._exit(9) if left[0] < 0 else real(path, target)
pathlib.Path.replace = replace
"""
    command = child("run", file, "--out", run.path, "--set", "units.k=100", "--overwrite", "units")
    command[2] = cut + command[2]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 9
    run_steps(changed, run, STEPS, overwrite=["units"])
    whole = RunFolder(run.path.parent / "whole")
    run_steps(changed, whole, STEPS)
    assert contents(run) == contents(whole)
    assert states(run) == DONE


@pytest.mark.parametrize("override", ["units.k=100", "units.k=200"])
def test_the_same_overwriting_command_goes_on(file: Path, recipe: Recipe, run: RunFolder, override: str) -> None:
    """Resuming with `--overwrite` in the command must not throw the new work away once more."""
    run_steps(recipe, run, STEPS)
    command = child("run", file, "--out", run.path, "--set", override, "--overwrite", "units")
    first = kill_after(command, 2 * NUM_SHARDS)
    assert "shard 4 written" in first
    second = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "shard" not in second
    assert states(run) == DONE
    third = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "shard 0" in third


def test_interrupt_says_how_to_go_on(file: Path, run: RunFolder) -> None:
    command = child("run", file, "--out", run.path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().strip().split("\n")
    # Either the signal came in time, or the whole run was quicker.
    assert process.returncode in (130, 0)
    if process.returncode == 130:
        assert errors[-1] == "interrupted; run the same command again to resume"
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.strip().endswith(str(run.report))
    assert states(run) == DONE
