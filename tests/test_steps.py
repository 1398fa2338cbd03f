"""The runner: each step once, in order, with a stamp that says what it used and made."""

import dataclasses
import multiprocessing
from pathlib import Path

import pytest

import fake_pipeline
from fake_pipeline import DONE, NUM_SHARDS, STEPS, contents, states
from sparq.errors import SparqError
from sparq.recipes.recipe import Recipe, load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import Step, run_steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fake_pipeline.write_recipe(tmp_path)


@pytest.fixture
def recipe(file: Path) -> Recipe:
    return load_recipe(file)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_all_steps_once(recipe: Recipe, run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sparq")
    run_steps(recipe, run, STEPS)
    assert states(run) == DONE
    assert load_recipe(run.recipe) == recipe
    before = contents(run)
    caplog.clear()
    run_steps(recipe, run, STEPS)
    assert caplog.messages == [f"{name}: already done" for name in DONE]
    assert contents(run) == before


def test_stamps_say_what_was_used_and_made(recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS, until="units")
    assert states(run) == {"prepare": "done", "units": "done"}
    stamp = run.stamp("units")
    prepared = run.stamp("prepare")
    assert stamp is not None
    assert prepared is not None
    assert stamp.settings["units"]["k"] == 200
    assert stamp.inputs == {"prepare": prepared.digest}
    assert [output.path for output in stamp.outputs] == [f"units/train/{i:05}.txt" for i in range(NUM_SHARDS)]
    assert stamp.outputs[0].size == len("0 200 0")
    assert stamp.seconds is not None
    assert stamp.seconds >= 0
    assert stamp.peak_memory_bytes is not None
    assert stamp.peak_memory_bytes > 1 << 20
    assert stamp.finished is not None
    assert stamp.finished.endswith("+00:00")


def test_peak_memory_is_of_the_step_alone(recipe: Recipe, run: RunFolder) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    # In a process of its own: memory that earlier tests give back in the middle would hide what `big` takes.
    child = multiprocessing.get_context("spawn").Process(target=_run_a_hungry_step, args=(recipe, run.path))
    child.start()
    child.join()
    assert child.exitcode == 0
    peak = {name: stamp.peak_memory_bytes for name in ("before", "big", "after") if (stamp := run.stamp(name))}
    assert peak["big"] is not None
    assert peak["after"] is not None
    assert peak["before"] is not None
    assert peak["big"] - peak["before"] > HUNGRY * 0.8
    assert peak["after"] - peak["before"] < HUNGRY * 0.5


HUNGRY = 256 << 20


def _run_a_hungry_step(recipe: Recipe, path: Path) -> None:
    base = dataclasses.replace(STEPS[0], files=lambda _: ())
    assert isinstance(base, Step)
    steps = [
        dataclasses.replace(base, name=name, run=work, owns=(name,))
        for name, work in (("before", fake_small), ("big", fake_big), ("after", fake_small))
    ]
    run_steps(recipe, RunFolder(path), steps)


def fake_big(recipe: Recipe, folder: RunFolder) -> list[Path]:
    assert len(bytearray(b"x") * HUNGRY) == HUNGRY
    return []


def fake_small(recipe: Recipe, folder: RunFolder) -> list[Path]:
    return []


def test_only_one_step(recipe: Recipe, run: RunFolder) -> None:
    with pytest.raises(SparqError) as caught:
        run_steps(recipe, run, STEPS, only="units")
    assert str(caught.value) == (
        f"units needs prepare, which is not done in {run.path}: run `sparq prepare` first, or `sparq run` for all steps"
    )
    run_steps(recipe, run, STEPS, only="prepare")
    run_steps(recipe, run, STEPS, only="units")
    run_steps(recipe, run, STEPS, only="vocab")
    run_steps(recipe, run, STEPS, only="train-softmax1")
    assert states(run).keys() == {"prepare", "units", "vocab", "train-softmax1"}
    with pytest.raises(SparqError, match="report needs train-vanilla, which is not done"):
        run_steps(recipe, run, STEPS, only="report")


@pytest.mark.parametrize("argument", ["only", "until", "overwrite"])
def test_unknown_steps(recipe: Recipe, run: RunFolder, argument: str) -> None:
    value = ["unit"] if argument == "overwrite" else "unit"
    with pytest.raises(SparqError, match=r"unknown step 'unit': did you mean 'units'\?"):
        run_steps(recipe, run, STEPS, **{argument: value})  # type: ignore[arg-type]
    assert not run.path.exists()
