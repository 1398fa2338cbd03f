"""The command line: help with defaults, one-line errors, exit statuses, and what the handlers call."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fake_pipeline
from fake_modules import insert
from sparq.cli import pipeline
from sparq.cli.main import build_parser, main
from sparq.configuration import load_yaml
from sparq.recipes.recipe import load_recipe

SOURCE = Path(__file__).resolve().parent.parent / "src"
COMMANDS = tuple(build_parser().get_default("commands"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fake_pipeline.write_recipe(tmp_path)


@pytest.fixture(autouse=True)
def _fake_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sparq.recipes.pipeline", fake_pipeline)

    def print_path(run: Any) -> None:
        """The fake pipeline's results.json has no table; tests/test_pipeline.py prints the real one."""
        if run is not None:
            print(run.report)  # noqa: T201

    for module in ("sparq.cli.pipeline", "sparq.cli.demo"):
        monkeypatch.setattr(f"{module}.print_results", print_path)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as a mistake, and return its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("sparq: error: ")
    return captured.err.removeprefix("sparq: error: ").strip()


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "SUPPRESS" not in shown
    assert "None" not in shown
    for section in re.split(r"\n  (?=-)", shown.partition("options:\n")[2]):
        option = section.split()[0].strip(",") if section.split() else ""
        required = re.search(rf"(?<!\[){option} [A-Z]", shown.partition("\n\n")[0].replace("\n", " "))
        if option and option not in ("-h", "--version") and not required:
            assert "(default:" in " ".join(section.split()), f"{command} {option}"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\b", shown, re.MULTILINE) for command in COMMANDS)


def test_help_is_quick_because_heavy_modules_stay_out() -> None:
    code = """
import sys
from sparq.cli.main import main
try:
    main(["train", "--help"])
except SystemExit:
    heavy = {"torch", "transformers", "numpy", "sklearn", "pyarrow"} & set(sys.modules)
    assert not heavy, heavy
"""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert time.perf_counter() - start < 5  # 0.2 s; generous, because other work may share the cores


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("sparq ")


# Mistakes in the arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND (see `sparq --help`)"),
        ("trian r.yaml", "unknown command 'trian': did you mean 'train'?"),
        ("xyz", "unknown command 'xyz': valid: prepare, units, vocab, train, "),
        ("--versoin", "unknown option '--versoin': did you mean '--version'? (see `sparq --help`)"),
        (
            "train r.yaml --oot x",
            "unknown option '--oot': did you mean '--out' or '--set'? (see `sparq train",
        ),
        ("train r.yaml --over=x --out y", "unknown option '--over': did you mean '--overwrite'?"),
        ("train r.yaml", "the following arguments are required: --out (see `sparq train --help`)"),
        ("train --out x", "the following arguments are required: RECIPE.yaml (see"),
        ("train a b --out c", "unexpected argument 'b': this command takes no more (see"),
        ("train a --out c -x", "unexpected argument '-x': this command takes no more (see"),
        ("train a --out", "argument --out: expected one argument (see `sparq train --help`)"),
        ("train nothing.yaml --out x", "no such file: nothing.yaml"),
        ("transcribe", "the following arguments are required: FILE, --model (see"),
        ("transcribe a.wav --model nowhere", "no model folder nowhere: --model expects RUN/models/FRAMEWORK"),
        ("transcribe nothing.wav --model .", "no such file: nothing.wav"),
        ("transcribe . --model .", ". is a folder: expected a recording"),
        ("continue --model .", "one of the arguments --text --audio is required"),
        ("continue --model . --text a --audio b", "argument --audio: not allowed with argument --text"),
        ("continue --model . --audio nothing.wav", "no such file: nothing.wav"),
        (
            "continue --model . --text a --precision w4a4rtn",
            "argument --precision: it is 'w4a4rtn': did you mean 'w4a4-rtn'",
        ),
        (
            "continue --model . --text a --max-new 0",
            "argument --max-new: '0' is not a whole number above 0",
        ),
        ("pretrained smollm2", "unknown pretrained model 'smollm2': did you mean 'smollm2-135m'?"),
    ],
)
def test_mistakes(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, *arguments.split()).startswith(message)


def test_a_value_may_look_like_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    insert(monkeypatch, "sparq.recipes.apply", continue_text=lambda text, **_: text, continue_audio=None)
    assert main(["continue", "--model", str(tmp_path), "--text", "--nay he said"]) == 0
    assert main(["continue", "--model", str(tmp_path), "--text=--nay"]) == 0
    assert capsys.readouterr().out == "--nay he said\n--nay\n"


# The pipeline


def test_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(str(tmp_path / "run" / "report.html"))
    assert re.search(r"^units: started\nunits: done in \d+\.\d s$", captured.err, re.MULTILINE)
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert "units: already done\n" in captured.err


def test_steps_one_by_one(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(file), "--out", str(tmp_path / "run"), "--set", "units.k=50"]
    assert error_of(capsys, "vocab", *options).startswith("vocab needs units, which is not done")
    for command in ("prepare", "units", "vocab", "train", "report"):
        assert main([command, *options]) == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").units.k == 50
    capsys.readouterr()
    message = error_of(capsys, "units", *options[:3])
    assert message.endswith("units.k was 50, is 200: use another --out or --overwrite units")
    assert main(["run", *options[:3], "--overwrite", "units", "--until", "vocab"]) == 0
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_runner_and_the_commands_have_the_same_steps() -> None:
    names = [step.name for step in fake_pipeline.STEPS]
    assert [name for name in pipeline.STEP_HELP if name in names] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.updtes=3"], "recipe.train.updtes is unknown: did you mean 'updates'"),
        (["--set", "train.updates"], "setting 'train.updates' is not of the form key=value"),
        (["--set", "frameworks=[sofmax1]"], "recipe.frameworks[0] is 'sofmax1': did you mean 'softmax1'?"),
        (["--overwrite", "unts"], "unknown step 'unts': did you mean 'units'"),
        (["--until", "vocabulary"], "unknown step 'vocabulary': did you mean 'vocab'?"),
    ],
)
def test_mistakes_leave_no_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert error_of(capsys, "run", file, "--out", tmp_path / "run", *options).startswith(message)
    assert not (tmp_path / "run").exists()


def test_skip_bad_reaches_the_recipe_and_makes_nothing_stale(file: Path, tmp_path: Path) -> None:
    options = [str(file), "--out", str(tmp_path / "run")]
    assert main(["prepare", *options, "--skip-bad"]) == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").prepare.skip_bad
    assert main(["run", *options]) == 0


def test_recipe(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: no mistakes found\n"
    assert main(["recipe", str(file), "--show", "--set", "train.learning_rate=1e-4"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_yaml(shown)["train"]["learning_rate"] == 1e-4
    assert load_recipe(shown) == load_recipe(file, ["train.learning_rate=1e-4"])


# What the other handlers call


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    insert(monkeypatch, "sparq.recipes.demo", demo=lambda **options: calls.append(options))
    assert main(["demo"]) == 0
    assert main(["demo", "--out", "there", "--quick", "--retrain"]) == 0
    assert calls == [
        {"out": Path("demo-out"), "retrain": False, "quick": False},
        {"out": Path("there"), "retrain": True, "quick": True},
    ]


@dataclass
class Transcript:
    path: Path
    text: str


def test_transcribe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def transcribe(*, model: Path, files: list[Path], precision: str) -> list[Transcript]:
        return [Transcript(file, f"{model.name} {precision}") for file in files]

    insert(monkeypatch, "sparq.recipes.apply", transcribe=transcribe)
    files = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for file in files:
        file.write_bytes(b"")
    model = tmp_path / "model"
    model.mkdir()
    assert main(["transcribe", *map(str, files), "--model", str(model), "--precision", "w4a4-rtn"]) == 0
    assert capsys.readouterr().out == f"{files[0]}\tmodel w4a4-rtn\n{files[1]}\tmodel w4a4-rtn\n"


def test_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(**options: Any) -> str:
        return f"{sorted(options)} {options['precision']} {options['max_new']}"

    insert(monkeypatch, "sparq.recipes.apply", continue_text=shown, continue_audio=shown)
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"")
    assert main(["continue", "--text", "hello", "--model", str(tmp_path)]) == 0
    assert main(["continue", "--audio", str(audio), "--model", str(tmp_path), "--max-new", "7"]) == 0
    assert capsys.readouterr().out.split("\n") == [
        "['max_new', 'model', 'precision', 'text'] full 50",
        "['file', 'max_new', 'model', 'precision'] full 7",
        "",
    ]


def test_pretrained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sparq.pretrained

    def folder(name: str, *, verify: bool) -> Path:
        assert verify
        return Path("/cache") / name

    monkeypatch.setattr(sparq.pretrained, "pretrained_folder", folder)
    assert main(["pretrained"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "smollm2-135m\t/cache/smollm2-135m"
    assert main(["pretrained", "whisper-tiny.en"]) == 0
    assert capsys.readouterr().out == "whisper-tiny.en\t/cache/whisper-tiny.en\n"
