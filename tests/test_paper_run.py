"""`sparq paper run`: every experiment at its smallest size, what it records, and the plan of the papers' size."""

import dataclasses
import math
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparq.bench.interleaved import Ratio
from sparq.cli.main import build_parser, main
from sparq.errors import SparqError
from sparq.files import read_json
from sparq.papers import EXPERIMENTS, Cell, Experiment, find_experiment, read_records
from sparq.papers.energy import read_joules
from sparq.papers.full_plan import estimate, full_plan, full_preamble
from sparq.papers.profiles import Profile, recipe_profile, small_profile, smoke_profile
from sparq.papers.records import add_records
from sparq.papers.runner import run_experiment
from sparq.papers.turns import times_of
from sparq.quantization import presets
from sparq.recipes.pipeline import STEPS
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import run_steps
from sparq.report.codec import row_from_json

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of everything."""
    folder = tmp_path_factory.mktemp("papers")
    assert main(["paper", "run", "all", "--profile", "smoke", "--out", str(folder)]) == 0
    return folder


def test_all_experiments_run_at_their_smallest(out: Path) -> None:
    records = {(r.cell, r.measure): r for r in read_records(out / "results.jsonl")}
    for experiment in EXPERIMENTS:
        for cell in experiment.all_cells:
            for measure in experiment.measures:
                record = records[cell, measure]
                assert record.values
                for name, value in record.values.items():
                    assert name.endswith(" tokens") if value is None else math.isfinite(value), record
    for record in records.values():
        assert record.profile == ("shapes" if record.measure == "parameters" else "smoke")
        assert record.provenance.packages["torch"]
        assert record.provenance.cpu
        assert record.seconds >= 0
    assert {path.stem for path in out.glob("*.html")} == {e.name for e in EXPERIMENTS if e.figure and e.measures}
    drawn = {path.name for path in out.glob("*.svg")}
    assert {"case-study-figure-1-curves.svg", "sparq-figure-3-outliers.svg"} <= drawn
    assert {"case-study-figure-2-head.svg", "sparq-figure-4-activations.svg"} <= drawn
    for path in out.glob("*.svg"):
        text = path.read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        assert "currentColor" not in text
    page = (out / "sparq-figure-4.html").read_text()
    places = [page.index(f"{name} lora") for name in ("vanilla", "softmax1", "max_shift")]
    assert places == sorted(places)


def test_the_same_command_again_measures_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "results.jsonl").read_bytes()
    assert main(["paper", "run", "sparq-9", "sparq-figure-3", "--out", str(out)]) == 0
    some = ["sparq-9", "sparq-4", "--frameworks", "vanilla", "--threads", "1"]
    assert main(["paper", "run", *some, "--out", str(out)]) == 0
    assert (out / "results.jsonl").read_bytes() == before
    shown = capsys.readouterr()
    assert "train-" not in shown.err
    assert "sparq-9: Weight clipping; ours on opt, smoke" in shown.out


def test_cells_differ_in_what_they_are_named_after(out: Path) -> None:
    values = {r.cell: r.values for r in read_records(out / "results.jsonl") if r.measure == "tasks"}
    clipped = [values[Cell(framework="vanilla", precision=f"w4a4-smoothquant{c}")] for c in ("", "-clip1", "-clip5")]
    assert len({v["textlm_ppl"] for v in clipped}) == 3
    adapted = [values[Cell(framework="vanilla", adaptation=a)] for a in ("full", "lora", "qlora", "qlora-4bit")]  # type: ignore[arg-type]
    assert len({v["textlm_ppl"] for v in adapted}) == 4
    assert values[Cell(framework="vanilla")] != values[Cell(framework="clipped")]


def test_a_cell_is_what_the_recipes_own_steps_make(out: Path, tmp_path: Path) -> None:
    """Trained, quantized and evaluated by `sparq run`, the same recipe gives the same numbers."""
    cell = Cell(framework="softmax1", precision="w4a4-smoothquant")
    recipe = smoke_profile(out / "smoke").recipe_of(cell, seed=0)
    recipe = dataclasses.replace(recipe, quantize=dataclasses.replace(recipe.quantize, schemes=(cell.precision,)))
    run = RunFolder(tmp_path / "run")
    run_steps(recipe, run, STEPS)
    row = row_from_json(read_json(run.evaluation(cell.framework, cell.precision)), "row")
    (record,) = [r for r in read_records(out / "results.jsonl") if (r.cell, r.measure) == (cell, "tasks")]
    assert row.textlm_ppl is not None
    assert row.speechlm_ppl is not None
    assert record.values["textlm_ppl"] == pytest.approx(row.textlm_ppl.value, rel=1e-6)
    assert record.values["speechlm_ppl"] == pytest.approx(row.speechlm_ppl.value, rel=1e-6)


def test_parameters_are_those_of_table_11(out: Path) -> None:
    found = {r.model: r.values for r in read_records(out / "results.jsonl") if r.measure == "parameters"}
    assert {model: values["lora_parameters"] for model, values in found.items()} == {
        "opt-125m": 9.437184, "opt-350m": 25.165824, "opt-1.3b": 50.331648,
    }  # fmt: skip


def test_times_are_taken_in_one_sitting_and_of_untrained_models(out: Path, tmp_path: Path) -> None:
    """If the time of one model is missing, those of all are measured anew: other days' times do not compare."""
    profile, results = smoke_profile(out / "smoke"), tmp_path / "results.jsonl"
    for name in ("sparq-3", "case-study-4"):
        experiment = find_experiment(name)
        old = [r for r in read_records(out / "results.jsonl") if r.measure in experiment.measures]
        assert {r.cell for r in old} == set(experiment.cells)
        add_records(results, old[1:])
        new = run_experiment(experiment, profile, out=tmp_path, results=results, seed=0)
        assert [r.cell for r in new] == list(experiment.cells)
        assert len({(r.note, r.seconds) for r in new}) == 1
        assert not {r.created for r in new} & {r.created for r in old}
        assert run_experiment(experiment, profile, out=tmp_path, results=results, seed=0) == new
    assert {path.name for path in tmp_path.glob("smoke-seed0/*")} == {"full"}
    assert not (tmp_path / "smoke-seed0" / "full" / "models").exists()


def test_times_are_ratios_of_rounds() -> None:
    """A baseline of 2 seconds, and one that took half as long again in the round between."""
    first, second = Cell(framework="vanilla"), Cell(framework="softmax1")
    ratios = {
        first: Ratio(median=1.04, low=0.9, high=1.1, seconds=2.0),
        second: Ratio(median=1.5, low=1.4, high=1.6, seconds=99.0),
    }
    assert times_of(ratios) == {first: 2.0, second: 3.0}


def test_a_training_that_diverges_is_a_result(out: Path, tmp_path: Path) -> None:
    smoke = smoke_profile(out / "smoke")
    train = dataclasses.replace(smoke.recipe.train, learning_rate=1e30, warmup_updates=0)
    profile = Profile(name="smoke", recipe=dataclasses.replace(smoke.recipe, train=train))
    cells = (Cell(framework="max_shift"), Cell(framework="max_shift", precision="w8a8-rtn"))
    experiment = Experiment(
        name="x", paper="sparq", element="Table 4", title="x", measures=("accuracy", "tasks"), cells=cells
    )
    records = run_experiment(experiment, profile, out=tmp_path, results=tmp_path / "results.jsonl", seed=0)
    assert len(records) == 4
    assert all(value is None for record in records for value in record.values.values())
    assert all("the loss is " in record.note for record in records)
    assert records[0].values == {"accuracy": None}
    assert set(records[1].values) == {"textlm_ppl", "speechlm_ppl", "asr_wer", "tts_uer"}
    assert run_experiment(experiment, profile, out=tmp_path, results=tmp_path / "results.jsonl", seed=0) == records


def test_other_settings_under_one_name_are_refused(out: Path) -> None:
    smoke = smoke_profile(out / "smoke")
    changed = dataclasses.replace(smoke.recipe, train=dataclasses.replace(smoke.recipe.train, clip_norm=2.0))
    with pytest.raises(SparqError, match="has results of 'smoke' .smoke, seed 0. under other settings"):
        run_experiment(
            find_experiment("sparq-7"), dataclasses.replace(smoke, recipe=changed),
            out=out, results=out / "results.jsonl", seed=0,
        )  # fmt: skip


def test_the_other_profiles_have_a_recipe_for_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARQ_CORPUS", str(tmp_path))
    recipes = REPOSITORY / "recipes" / "paper"
    for profile in (small_profile(tmp_path), *(recipe_profile(p) for p in sorted(recipes.glob("*-full.yaml")))):
        for cell in {cell for experiment in EXPERIMENTS for cell in experiment.all_cells}:
            recipe = profile.recipe_of(cell, seed=1)
            assert (recipe.seed, recipe.training_seed, recipe.frameworks) == (0, 1, (cell.framework,))
            assert recipe.train.method == cell.adaptation.partition("-")[0]
            if cell.rank:
                assert recipe.train.rank in (cell.rank, cell.rank // 4)
            if cell.precision != "full":
                assert profile.scheme_of(cell.precision).name == cell.precision.removesuffix("-grouped").partition(
                    "-clip"
                )[0].removesuffix("-tuned")


def test_norms_of_trained_models(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of LoRA's the query update is measured too; after full fine-tuning there is none."""
    for adaptation, columns in (("lora", 5), ("full", 3)):
        model = out / "smoke-seed0" / adaptation / "models" / "softmax1"
        assert main(["paper", "norms", str(model), "--tokens", "60"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        layers = [line for line in lines if line and line[0] in ("0", "1")]
        assert [len(line) for line in layers] == [columns, columns]


def test_ranks_are_divided_and_alpha_keeps_its_share(tmp_path: Path) -> None:
    profile = smoke_profile(tmp_path)
    train = profile.recipe_of(Cell(framework="vanilla", adaptation="lora", rank=512), seed=3).train
    assert (train.rank, train.alpha, train.method) == (32, 32, "lora")
    assert profile.recipe_of(Cell(framework="vanilla", adaptation="qlora-4bit"), seed=3).train.base == "nf4"
    assert profile.recipe_of(Cell(framework="vanilla"), seed=3).train.seed == 3
    clipped = profile.scheme_of("w8a8-smoothquant-clip5")
    assert (clipped.weight_range, clipped.weight_tail, clipped.weight_bits) == ("percentile", 0.05, 8)
    with pytest.raises(SparqError, match="is not a scheme"):
        profile.scheme_of("w8a8")


def test_tuned_takes_the_profiles_settings(tmp_path: Path) -> None:
    small = dataclasses.replace(smoke_profile(tmp_path), tuned={"group_size": 64}, tuned_sequences=2048)
    assert small.scheme_of("w4a4-best-tuned") == dataclasses.replace(small.scheme_of("w4a4-best"), group_size=64)
    assert [small.calibration_sequences(name) for name in ("w4a4-best", "w4a4-best-tuned")] == [4, 2048]
    fewer = dataclasses.replace(small, tuned_sequences=9)
    plain, tuned = (Cell(framework="vanilla", precision=f"w4a4-best{end}") for end in ("", "-tuned"))
    assert small.settings_of(plain, 0) == fewer.settings_of(plain, 0)
    assert small.settings_of(tuned, 0) != fewer.settings_of(tuned, 0)


def test_a_method_that_changes_is_another_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = smoke_profile(tmp_path)
    full, rotated = (Cell(framework="vanilla", precision=name) for name in ("full", "w4a4-rotation"))
    before = profile.settings_of(full, 0), profile.settings_of(rotated, 0)
    monkeypatch.setattr(presets, "_CLIP", 0.8)
    assert profile.settings_of(full, 0) == before[0]
    assert profile.settings_of(rotated, 0) != before[1]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_plan_of_the_papers_size_is_commands_that_exist(experiment: Experiment) -> None:
    lines = full_plan(experiment).splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) >= (3 if experiment.measures and experiment.measures != ("parameters",) else 0)
    for command in commands:
        arguments = build_parser().parse_strictly(shlex.split(command, comments=True)[1:])
        assert arguments.experiments == [experiment.name]
        assert arguments.recipe is None or (REPOSITORY / arguments.recipe).is_file()


def test_the_plan_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["paper", "run", "all", "--profile", "full"]) == 0
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    assert shown.startswith(full_preamble())
    assert "sparq paper run sparq-6 --recipe recipes/paper/opt1.3b-full.yaml" in shown


def test_the_estimate_is_its_formula() -> None:
    """SpARQ table 3 on OPT-125m: three trainings of 2e10 tokens, 6 FLOPs a parameter and token, 93.6 TFLOP/s."""
    found = estimate(find_experiment("sparq-3"), "opt-125m")
    assert found.trainings == 3
    assert found.gpu_hours == pytest.approx(3 * 1.5e19 / 9.36e13 / 3600)
    assert found.disk_gb == pytest.approx(3 * 2.5)
    # Three of full fine-tuning, and three ranks for each of three frameworks.
    assert estimate(find_experiment("sparq-5"), "opt-125m").trainings == 12
    assert estimate(find_experiment("sparq-6"), "opt-125m").trainings == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparq-figure-1"], "sparq-figure-1 is a drawing"),
        (["table 1"], "unknown experiment 'table 1'"),
        (["sparq-1", "--profile", "small", "--recipe", "x.yaml"], "argument --recipe: not allowed with"),
        (["sparq-1", "--recipe", "nothing.yaml"], "no such file: nothing.yaml"),
        (["sparq-1", "--seed", "-1"], "argument --seed: '-1' is not a whole number"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["paper", "run", *arguments])
    except SystemExit as exit_:
        status = int(str(exit_.code))
    assert status == 2
    assert message in capsys.readouterr().err


def test_energy_is_the_sum_of_packages_where_it_can_be_read(tmp_path: Path) -> None:
    assert read_joules(tmp_path) is None
    for name, value in (("intel-rapl:0", 2_500_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    assert read_joules(tmp_path) == 3.0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")
    assert read_joules(tmp_path) is None


def test_grouped_takes_the_profiles_groups(tmp_path: Path) -> None:
    profile = smoke_profile(tmp_path)
    for name in ("w4a4-rotation", "w4a4-best-tuned"):
        grouped = profile.scheme_of(f"{name}-grouped")
        assert (grouped.group_size, grouped.activation_granularity, grouped.activation_clip) == (16, "group", 0.95)
        assert grouped.low_rank == profile.scheme_of(name).low_rank
        assert profile.calibration_sequences(f"{name}-grouped") == profile.calibration_sequences(name)


def test_a_recipes_settings_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = small_profile(tmp_path, ["name=all of it", "evaluate.max_utterances=0"])
    assert (changed.recipe.name, changed.recipe.evaluate.max_utterances) == ("all of it", 0)
    assert main(["paper", "run", "sparq-8", "--set", "evaluate.max_utterances=0"]) == 2
    assert "the profile smoke has none: name --profile small" in capsys.readouterr().err


def test_what_the_demo_ships_is_taken_instead_of_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, shipped = small_profile(tmp_path), small_profile(tmp_path, shipped=True)
    lora, full, gated = (
        Cell(framework="softmax1", adaptation="lora", precision="w4a4-best"), Cell(framework="softmax1"),
        Cell(framework="gated", adaptation="lora"),
    )  # fmt: skip
    others = (full, gated, dataclasses.replace(lora, rank=512))
    assert [shipped.ships(cell) for cell in (lora, *others)] == [True, False, False, False]
    assert not plain.ships(lora)
    assert plain.settings_of(lora, 0) == shipped.settings_of(lora, 0)  # the same numbers, so one results file
    other = small_profile(tmp_path, ["name=more units", "units.k=200", "vocab.size=600", "evaluate.vocoder=null"])
    with pytest.raises(SparqError, match="leave units and vocab as they are"):
        small_profile(tmp_path, ["units.k=200"], shipped=True)
    # Speech is the same for all, so that they share it; only the training is one's own.
    settings = [
        {step.name: step.config(profile.recipe_of(cell, 0)) for step in profile.steps_of(cell)}
        for profile, cell in ((shipped, lora), (shipped, full), (plain, lora), (other, lora))
    ]
    assert [one["train"].get("adapters") for one in settings] == ["shipped", None, None, None]
    # The vocoder speaks the shipped units alone, and fitted on another processor they are others.
    for step in ("units", "vocab"):
        assert settings[0][step] == settings[1][step] == settings[2][step]
        assert [one[step].get("adapters") for one in settings[2:]] == ["shipped", None]
    assert main(["paper", "run", "sparq-8", "--profile", "small", "--shipped", "--seed", "1"]) == 2
    assert "--shipped is for --profile small with --seed 0" in capsys.readouterr().err
