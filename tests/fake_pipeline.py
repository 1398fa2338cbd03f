"""Steps with the shape of the real ones and next to no work, and helpers to run and kill them.

Every piece of work announces itself on standard output before and after, so that a test can kill it there.
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from sparq.files import read_json, write_json, write_text
from sparq.recipes.recipe import Recipe, used_settings
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import FrameworkStep, Step

NUM_SHARDS = 5
RECIPE = """
name: fake
prepare: {sources: [{manifest: manifest.tsv, corpus: fake}]}
model: {backbone: fake}
train: {updates: 4, warmup_updates: 0}
frameworks: [vanilla, softmax1]
"""


def write_recipe(folder: Path) -> Path:
    (folder / "manifest.tsv").write_text("id\tpath\n1\ta.wav\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def announce(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def prepare(recipe: Recipe, folder: RunFolder) -> list[Path]:
    announce("prepare")
    write_text(folder.manifest, recipe.prepare.sources[0].manifest.read_text())
    announce("prepare written")
    return [folder.manifest]


def units(recipe: Recipe, folder: RunFolder) -> list[Path]:
    for index in range(NUM_SHARDS):
        shard = folder.units_split("train") / f"{index:05}.txt"
        if not shard.exists():
            announce(f"shard {index}")
            write_text(shard, f"{index} {recipe.units.k} {recipe.seed}")
            announce(f"shard {index} written")
    return [folder.units]


def vocab(recipe: Recipe, folder: RunFolder) -> list[Path]:
    announce("vocab")
    text = "".join(path.read_text() for path in sorted(folder.units.rglob("*.txt")))
    write_text(folder.vocab / "joint.model", hashlib.sha256(text.encode()).hexdigest())
    announce("vocab written")
    return [folder.vocab]


def train(recipe: Recipe, folder: RunFolder, framework: str) -> list[Path]:
    state_path = folder.model(framework) / "state.json"
    state = read_json(state_path) if state_path.exists() else {"update": 0, "loss": 0.0}
    start = len(framework) + len((folder.vocab / "joint.model").read_text())
    while state["update"] < recipe.train.updates:
        announce(f"update {framework} {state['update']}")
        state = {"update": state["update"] + 1, "loss": state["loss"] / 2 + start}
        write_json(state_path, state)
        announce(f"update {framework} {state['update']} written")
    return [state_path]


def report(recipe: Recipe, folder: RunFolder) -> list[Path]:
    announce("report")
    write_json(folder.results, {name: read_json(folder.model(name) / "state.json") for name in recipe.frameworks})
    write_text(folder.report, json.dumps(read_json(folder.results)))
    announce("report written")
    return [folder.results, folder.report]


STEPS = (
    Step(
        name="prepare",
        needs=(),
        config=lambda recipe: used_settings(recipe, "prepare", "seed"),
        files=lambda recipe: [source.manifest for source in recipe.prepare.sources],
        run=prepare,
        owns=("manifest.tsv",),
    ),
    Step(
        name="units",
        needs=("prepare",),
        config=lambda recipe: used_settings(recipe, "units", "seed"),
        run=units,
        owns=("units",),
    ),
    Step(
        name="vocab",
        needs=("units",),
        config=lambda recipe: used_settings(recipe, "vocab"),
        run=vocab,
        owns=("vocab",),
    ),
    FrameworkStep(
        name="train",
        needs=("units", "vocab"),
        config=lambda recipe: used_settings(recipe, "train", "model", "seed"),
        run=train,
        owns=("models/{framework}",),
    ),
    Step(
        name="report",
        needs=("train",),
        config=lambda recipe: used_settings(recipe, "name", "frameworks"),
        run=report,
        owns=("results.json", "report.html"),
    ),
)


DONE = dict.fromkeys(["prepare", "units", "vocab", "train-vanilla", "train-softmax1", "report"], "done")

SOURCE = Path(__file__).resolve().parent.parent / "src"
CHILD = """
import sys
sys.path[:0] = [{tests!r}, {source!r}]
import fake_pipeline
sys.modules["sparq.recipes.pipeline"] = fake_pipeline
import sparq.cli.pipeline
sparq.cli.pipeline.print_results = lambda run: print(run.report)
from sparq.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def child(*arguments: object) -> list[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), source=str(SOURCE))
    return [sys.executable, "-c", code, *map(str, arguments)]


def contents(folder: RunFolder) -> dict[str, bytes]:
    """Every file of a run but the stamps, which hold times, and the recipe, which holds paths."""
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in folder.path.rglob("*")
        if path.is_file() and ".steps" not in path.parts and path.name != "recipe.yaml"
    }


def states(folder: RunFolder) -> dict[str, str]:
    stamps = {path.stem: folder.stamp(path.stem) for path in folder.steps.glob("*.json")}
    return {name: stamp.state for name, stamp in stamps.items() if stamp is not None}


def kill_after(command: Iterable[str], num_lines: int, signal_number: int = signal.SIGKILL) -> list[str]:
    """Run a command until it has printed so many lines, send it a signal, and return what it printed."""
    with subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(num_lines)]
        process.send_signal(signal_number)
        lines += [line.strip() for line in process.stdout]
    return [line for line in lines if line]
