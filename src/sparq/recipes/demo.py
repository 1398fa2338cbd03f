"""`sparq demo`: the main job on the corpus, adapters and prose that the package carries."""

import dataclasses
import logging
import shutil
import zipfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sparq.adaptation import read_description
from sparq.files import atomic_path, remove
from sparq.pretrained import pretrained_folder
from sparq.recipes.jobs import FrameworkStep, Step, Steps
from sparq.recipes.pipeline import STEPS
from sparq.recipes.recipe import Recipe, load_recipe
from sparq.recipes.report_step import training_curve
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.steps import run_steps
from sparq.recipes.train_step import load_split, load_vocabulary, start_training, training_folder

_LOG = logging.getLogger(__name__)

LIVE_UPDATES = 12
"""Updates of each shipped training that the demo repeats before the eyes of its user."""

QUICK_LIVE_UPDATES = 3

_PLACES = {"units": ("kmeans.safetensors", "units/kmeans.safetensors"), "vocab": ("vocabulary", "vocab")}
"""What steps would fit anew, in the folder of a shipped model and in a run."""

QUICK = (
    "frameworks=[vanilla]",
    "evaluate.max_utterances=4",
    "evaluate.tts_utterances=2",
    "quantize.schemes=[w4a4-rtn]",
    "quantize.calibration_sequences=4",
)


def demo(*, out: Path, retrain: bool = False, quick: bool = False) -> RunFolder:
    """Run the main job on the embedded corpus and return its folder.

    The adapters were trained by the same recipe and are shipped with the k-means and the vocabulary that they belong
    to; the demo repeats the first updates of each training and shows how far the losses are from the shipped log.
    Everything else is done in full: checking and encoding the speech, quantizing, evaluating, reporting.

    Args:
        out: the run folder.
        retrain: fit k-means and vocabulary and train all adapters from nothing instead.
        quick: everything at a tiny size, as a check.
    """
    with as_file(files("sparq") / "demo") as assets:
        run = RunFolder(out)
        run.create()
        for name in ("whisper-tiny.en", "smollm2-135m", "whisper-base"):
            pretrained_folder(name)
        corpus = run.path / "corpus"
        if not corpus.exists():
            _unpack(assets / "corpus.zip", corpus)
        recipe = load_recipe(assets / "demo.yaml", QUICK if quick else (), environ={"SPARQ_DEMO_CORPUS": str(corpus)})
        live = QUICK_LIVE_UPDATES if quick else LIVE_UPDATES
        steps = STEPS if retrain else shipped_steps(assets / "adapters", live_updates=live)
        run_steps(recipe, run, steps)
        return run


def _unpack(archive: Path, folder: Path) -> None:
    with atomic_path(folder) as temporary, zipfile.ZipFile(archive) as contents:
        contents.extractall(temporary)


def shipped_steps(adapters: Path, *, train: bool = True, live_updates: int) -> Steps:
    """Return the steps of the pipeline as the demo does them with shipped adapters.

    The k-means and the vocabulary are those that the adapters were trained with: fitted anew on another kind of CPU
    they would differ in the last bits, and the adapters would not belong to them. Speech is still encoded here.

    Args:
        adapters: a folder of shipped models by framework.
        train: take the models too, instead of training them.
        live_updates: updates of each shipped training that are repeated.
    """

    def shipped(step: Step | FrameworkStep) -> Step | FrameworkStep:
        if isinstance(step, FrameworkStep):
            return _taken(step, adapters, live_updates) if train and step.name == "train" else step
        return _placed(step, adapters, live_updates) if step.name in _PLACES else step

    return tuple(map(shipped, STEPS))


def _config(step: Step | FrameworkStep, live_updates: int) -> Callable[[Recipe], dict[str, Any]]:
    original = step.config
    return lambda recipe: {**original(recipe), "adapters": "shipped", "live_updates": live_updates}


def _taken(step: FrameworkStep, adapters: Path, live_updates: int) -> FrameworkStep:
    def run(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
        return take_shipped(recipe, run, framework, adapters / framework, live_updates)

    return dataclasses.replace(step, config=_config(step, live_updates), run=run)


def _placed(step: Step, adapters: Path, live_updates: int) -> Step:
    original = step.run
    source, target = _PLACES[step.name]

    def run(recipe: Recipe, run: RunFolder) -> list[Path]:
        _copy(min(adapters.iterdir()) / source, run.path / target)  # all have the same
        return original(recipe, run)

    return dataclasses.replace(step, config=_config(step, live_updates), run=run)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        with atomic_path(target) as temporary:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, temporary)


def take_shipped(recipe: Recipe, run: RunFolder, framework: str, shipped: Path, live_updates: int) -> list[Path]:
    """Copy a shipped model and its log into the run, and repeat the first updates of its training."""
    set_threads(recipe)
    vocabulary = load_vocabulary(run)
    folder = training_folder(run, framework)
    with atomic_path(folder / "train.jsonl") as temporary:
        shutil.copyfile(shipped / "train.jsonl", temporary)
    with atomic_path(run.model(framework)) as temporary:
        shutil.copytree(shipped, temporary, ignore=shutil.ignore_patterns("train.jsonl"))
    taken = [run.model(framework), folder / "train.jsonl"]
    training = read_description(run.model(framework)).training
    _LOG.info(
        "  %s: shipped adapters (%d updates, %d tokens, %.0f minutes of training)",
        framework, training["updates"], training["tokens"], training["seconds"] / 60,
    )  # fmt: skip
    if not live_updates:
        return taken
    live, _ = start_training(
        recipe,
        framework,
        vocabulary=vocabulary,
        utterances=load_split(run, "train", vocabulary),
        validation=[],
        folder=folder / "live",
        updates=live_updates,
    )
    live.train(f"live slice {framework}")
    remove(folder / "live" / "checkpoint")
    _LOG.info(
        "  %s: %d updates repeated live: loss %.2f -> %.2f; %s",
        framework, len(live.log), live.log[0].loss, live.log[-1].loss, training_curve(run, framework).comparison(),
    )  # fmt: skip
    return [*taken, live.log_file]
