"""Run folders: locks, leftovers of a kill, and places that cannot be one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fake_pipeline
from fake_pipeline import SOURCE, STEPS, child
from sparq.errors import SparqError
from sparq.files import write_json
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


def test_two_processes_cannot_share_a_folder(file: Path, run: RunFolder) -> None:
    with run.lock():
        second = subprocess.run(child("run", file, "--out", run.path), capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout) == (2, "")
    # Libraries may have said something before.
    assert second.stderr.splitlines()[-1] == (
        f"sparq: error: {run.path} is in use by process {os.getpid()}: wait until it ends or use another --out"
    )
    with run.lock():  # free again
        pass


def test_leftovers_of_a_kill_are_swept(run: RunFolder) -> None:
    with run.lock():
        pass
    (run.path / "models" / "vanilla").mkdir(parents=True)
    kept = run.path / "models" / "vanilla" / "weights.partial.json"
    kept.write_text("{}")
    for name in (
        ".manifest.4711.partial.tsv",
        ".joint.4711.partial",
        "models/vanilla/.w.1.partial.safetensors",
    ):
        (run.path / name).write_text("half")
    (run.path / "models" / ".checkpoint.12.partial").mkdir()
    (run.path / "models" / ".checkpoint.12.partial" / "a").write_text("half")
    with run.lock():
        left = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert left == {".steps/lock", "models/vanilla/weights.partial.json"}
    assert not (run.path / "models" / ".checkpoint.12.partial").exists()


def test_a_folder_replaced_halfway_comes_back(run: RunFolder) -> None:
    """`atomic_path` moves the old folder away before the new one comes; a kill between must not lose both."""
    checkpoint = run.path / "models" / "vanilla" / "checkpoint"
    with run.lock():
        checkpoint.mkdir(parents=True)
        (checkpoint / "state").write_text("old")
    code = f"""
import os, pathlib
from sparq.files import atomic_path
real = pathlib.Path.rename
pathlib.Path.rename = lambda path, target: os._exit(9) if ".partial" in path.name else real(path, target)
with atomic_path(pathlib.Path({str(checkpoint)!r})) as temporary:
    temporary.mkdir()
    (temporary / "state").write_text("new")
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 9
    assert not checkpoint.exists()
    with run.lock():
        pass
    assert (checkpoint / "state").read_text() == "old"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_places_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparqError, match=r"file is a file: --out expects a folder"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(SparqError, match=r"home holds files but no run: --out expects a new folder"):
        RunFolder(tmp_path / "home").create()
    with pytest.raises(SparqError, match=r"cannot make the run folder .*: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create()
    RunFolder(tmp_path / "empty").create()
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_damaged_stamp(recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS, until="prepare")
    run.stamp_path("prepare").write_text("{")
    with pytest.raises(SparqError, match=r"prepare.json is not a JSON file"):
        run_steps(recipe, run, STEPS)
    write_json(run.stamp_path("prepare"), {"state": "doen"})
    with pytest.raises(SparqError, match=r"prepare.json.state is 'doen': did you mean 'done'\?"):
        run_steps(recipe, run, STEPS)
