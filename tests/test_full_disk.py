"""A disk that fills up in the middle of a run: one line, nothing half-written, and the same command goes on."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_world
from sparq.units import read_units


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)):
        pytest.skip("no right to mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    recipe = small_world.write_recipe(
        tmp_path / "recipe.yaml",
        small_world.make_corpus(tmp_path / "corpus"),
        small_world.make_backbone(tmp_path / "backbone"),
        frameworks=["softmax1"],
    )
    run = small_disk / "run"
    command = [sys.executable, "-m", "sparq", "run", str(recipe), "--out", str(run)]
    full = subprocess.run(command, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("sparq: error: ")
    assert "no space left" in last.lower()
    assert "Traceback" not in full.stderr
    assert not list(run.rglob("*.partial*"))
    assert sum(1 for _ in read_units(run / "units", "train"))  # what was finished before is whole
    assert mount("-o", "remount,size=64m", str(small_disk))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (run / "report.html").exists()
