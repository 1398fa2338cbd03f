"""Staleness: what differs is named, and nothing is overwritten unasked."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import fake_pipeline
from fake_pipeline import DONE, STEPS, contents, states
from sparq.errors import SparqError
from sparq.recipes.recipe import Recipe, load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import FrameworkStep, plan, run_steps


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fake_pipeline.write_recipe(tmp_path)


@pytest.fixture
def recipe(file: Path) -> Recipe:
    return load_recipe(file)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_changed_setting_is_named_and_nothing_is_touched(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    before = contents(run), run.recipe.read_text()
    changed = load_recipe(file, ["units.k=100"])
    for selection in ({}, {"only": "units"}, {"only": "prepare"}, {"until": "vocab"}):
        with pytest.raises(SparqError) as caught:
            run_steps(changed, run, STEPS, **selection)
        assert str(caught.value) == (f"{run.path}: units.k was 200, is 100: use another --out or --overwrite units")
    assert (contents(run), run.recipe.read_text()) == before


def test_overwriting_redoes_the_step_and_those_that_need_it(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    before = contents(run)
    (run.units / "stray.txt").write_text("of an older version")
    run_steps(load_recipe(file, ["units.k=100"]), run, STEPS, overwrite=["units"], only="units")
    assert states(run) == {"prepare": "done", "units": "done"}
    assert contents(run).keys() == {path for path in before if path.startswith(("manifest", "units"))}
    assert (run.units / "train" / "00000.txt").read_text() == "0 100 0"


def test_several_changed_settings(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    overrides = ["train.rank=64", "train.task_weights.asr=2", "name=other"]
    with pytest.raises(SparqError) as caught:
        run_steps(load_recipe(file, overrides), run, STEPS)
    assert str(caught.value) == (
        f"{run.path}: train.rank was 256, is 64, train.task_weights.asr was 1.0, is 2.0: "
        "use another --out or --overwrite train"
    )
    with pytest.raises(SparqError, match=r"units.k was 200, is 9: use another --out or --overwrite units"):
        run_steps(load_recipe(file, ["units.k=9", *overrides]), run, STEPS)


def test_settings_inside_lists_are_named(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    with pytest.raises(SparqError, match=r"prepare.sources.0.corpus was 'fake', is 'real': use another"):
        run_steps(load_recipe(file, ["prepare.sources.0.corpus=real"]), run, STEPS)
    with pytest.raises(SparqError, match=r": frameworks was \['vanilla', 'softmax1'\], is \['vanilla'\]: use .*report"):
        run_steps(load_recipe(file, ["frameworks=[vanilla]"]), run, STEPS)


def test_a_new_framework_leaves_the_others_alone(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    three = load_recipe(file, ["frameworks=[vanilla, softmax1, max_shift]"])
    old = run.stamp("train-vanilla")
    run_steps(three, run, STEPS, overwrite=["report"])
    assert states(run) == {**DONE, "train-max_shift": "done"}
    assert run.stamp("train-vanilla") == old
    assert json.loads(run.results.read_text()).keys() == {"vanilla", "softmax1", "max_shift"}


def test_one_framework_can_be_redone(recipe: Recipe, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(recipe, run, STEPS)
    capsys.readouterr()
    run_steps(recipe, run, STEPS, overwrite=["train-softmax1"])
    lines = capsys.readouterr().out.split("\n")
    assert "update softmax1 0" in lines
    assert "update vanilla 0" not in lines
    assert "report" in lines


def test_other_content_of_a_file_is_noticed(file: Path, recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    manifest = file.parent / "manifest.tsv"
    manifest.write_text("id\tpath\n2\tb.wav\n")
    with pytest.raises(SparqError) as caught:
        run_steps(recipe, run, STEPS)
    assert f"{manifest} has other content now: use another --out or --overwrite prepare" in str(caught.value)
    manifest.unlink()
    with pytest.raises(SparqError, match=f"no such file: {manifest}"):
        run_steps(recipe, run, STEPS)


def test_a_raised_version_is_stale(recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS)
    steps = [dataclasses.replace(step, version=2) if step.name == "vocab" else step for step in STEPS]
    with pytest.raises(SparqError, match=r"vocab was made by another version of sparq .* --overwrite vocab$"):
        run_steps(recipe, run, steps)


def test_a_begun_step_of_other_settings_is_not_mixed(file: Path, recipe: Recipe, run: RunFolder) -> None:
    def break_off(recipe: Recipe, folder: RunFolder) -> list[Path]:
        (folder.units / "train").mkdir(parents=True)
        (folder.units / "train" / "00000.txt").write_text("of k 200")
        raise SparqError("a bad recording")

    steps = [dataclasses.replace(step, run=break_off) if step.name == "units" else step for step in STEPS]
    with pytest.raises(SparqError, match="a bad recording"):
        run_steps(recipe, run, steps)
    assert states(run) == {"prepare": "done", "units": "started"}
    other = load_recipe(file, ["units.k=100"])
    with pytest.raises(SparqError, match=r"units.k was 200, is 100: use another --out or --overwrite units"):
        run_steps(other, run, STEPS)
    run_steps(other, run, STEPS, overwrite=["units"], until="units")
    assert (run.units / "train" / "00000.txt").read_text() == "0 100 0"


def test_a_step_that_failed_with_nothing_written_may_change(file: Path, recipe: Recipe, run: RunFolder) -> None:
    def fail(recipe: Recipe, folder: RunFolder) -> list[Path]:
        folder.units.mkdir()
        raise SparqError("a bad recording")

    steps = [dataclasses.replace(step, run=fail) if step.name == "units" else step for step in STEPS]
    with pytest.raises(SparqError, match="a bad recording"):
        run_steps(recipe, run, steps)
    run_steps(load_recipe(file, ["units.k=100"]), run, STEPS)
    assert states(run) == DONE


def test_files_that_no_step_made(recipe: Recipe, run: RunFolder) -> None:
    run_steps(recipe, run, STEPS, until="prepare")
    run.vocab.mkdir()
    (run.vocab / "joint.model").write_text("of a friend")
    with pytest.raises(SparqError, match=r": vocab is there, but no vocab step of this run made it: .*vocab$"):
        run_steps(recipe, run, STEPS)
    run_steps(recipe, run, STEPS, overwrite=["vocab"])
    assert states(run) == DONE


def test_missing_and_changed_outputs(recipe: Recipe, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(recipe, run, STEPS)
    shard = run.units / "train" / "00003.txt"
    before = contents(run)
    capsys.readouterr()
    shard.unlink()
    assert not run.is_done("units", plan(recipe, STEPS)[1].key)
    run_steps(recipe, run, STEPS)
    assert capsys.readouterr().out.split("\n") == ["shard 3", "shard 3 written", ""]
    assert contents(run) == before

    shard.write_text("3 200 9")
    with pytest.raises(SparqError, match=r"units/train/00003.txt has changed since units made it: .* units$"):
        run_steps(recipe, run, STEPS)


def test_a_copied_folder_stays_done(recipe: Recipe, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(recipe, run, STEPS)
    copy = RunFolder(run.path.parent / "copy")
    shutil.copytree(run.path, copy.path, copy_function=shutil.copyfile)
    capsys.readouterr()
    run_steps(recipe, copy, STEPS)
    assert capsys.readouterr().out == ""


def test_dependents_of_another_result_are_stale(recipe: Recipe, run: RunFolder) -> None:
    """A step whose output got lost may make something else; what was built on the old must not stay."""

    def other_units(recipe: Recipe, folder: RunFolder) -> list[Path]:
        (folder.units / "train" / "00000.txt").write_text("something else")
        return [folder.units]

    run_steps(recipe, run, STEPS)
    (run.units / "train" / "00000.txt").unlink()
    steps = [dataclasses.replace(step, run=other_units) if step.name == "units" else step for step in STEPS]
    message = r"units is not what vocab was made from: use another --out or --overwrite vocab$"
    for _ in range(2):
        with pytest.raises(SparqError, match=message):
            run_steps(recipe, run, steps)
    run_steps(recipe, run, steps, overwrite=["vocab"])
    assert states(run) == DONE


def test_an_output_outside_of_what_the_step_owns_is_a_bug(recipe: Recipe, run: RunFolder) -> None:
    step = dataclasses.replace(STEPS[0], owns=("elsewhere",))
    with pytest.raises(AssertionError, match="which it does not own"):
        run_steps(recipe, run, [step])


def test_keys_depend_on_everything_before(file: Path, recipe: Recipe) -> None:
    keys = {job.name: job.key for job in plan(recipe, STEPS)}
    other = {job.name: job.key for job in plan(load_recipe(file, ["units.k=100"]), STEPS)}
    assert {name for name in keys if keys[name] != other[name]} == keys.keys() - {"prepare"}
    assert len(set(keys.values())) == len(keys)


def test_framework_steps_need_their_own_framework(recipe: Recipe) -> None:
    train = next(step for step in STEPS if isinstance(step, FrameworkStep))
    quantize = dataclasses.replace(train, name="quantize", needs=("units", "train"), owns=("quantized/{framework}",))
    jobs = {job.name: job for job in plan(recipe, [*STEPS[:-1], quantize, STEPS[-1]])}
    assert jobs["quantize-softmax1"].needs == ("units", "train-softmax1")
    assert jobs["quantize-softmax1"].owns == ("quantized/softmax1",)
    assert jobs["report"].needs == ("train-vanilla", "train-softmax1")
