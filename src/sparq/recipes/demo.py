"""`sparq demo`: the main job on the corpus, adapters and prose that the package carries."""

import dataclasses
import logging
import shutil
import zipfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sparq.adaptation import read_description
from sparq.files import atomic_path, remove
from sparq.pretrained import pretrained_folder
from sparq.recipes.jobs import FrameworkStep, Step
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
        steps = STEPS if retrain else tuple(_shipped(step, assets / "adapters") for step in STEPS)
        run_steps(recipe, run, steps)
        return run


def _unpack(archive: Path, folder: Path) -> None:
    with atomic_path(folder) as temporary, zipfile.ZipFile(archive) as contents:
        contents.extractall(temporary)


def _shipped(step: Step | FrameworkStep, adapters: Path) -> Step | FrameworkStep:
    """Return a step as the demo does it with shipped adapters.

    The k-means and the vocabulary are those that the adapters were trained with: fitted anew on another kind of CPU
    they would differ in the last bits, and the adapters would not belong to them. Speech is still encoded here.
    """
    if step.name not in ("units", "vocab", "train"):
        return step
    original = step.config

    def config(recipe: Recipe) -> dict[str, Any]:
        return {**original(recipe), "adapters": "shipped", "live_updates": LIVE_UPDATES}

    if isinstance(step, FrameworkStep):

        def run_train(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
            return take_shipped(recipe, run, framework, adapters / framework)

        return dataclasses.replace(step, config=config, run=run_train)
    run_original = step.run
    source, target = {
        "units": ("kmeans.safetensors", "units/kmeans.safetensors"),
        "vocab": ("vocabulary", "vocab"),
    }[step.name]

    def run_placed(recipe: Recipe, run: RunFolder) -> list[Path]:
        _copy(adapters / recipe.frameworks[0] / source, run.path / target)
        return run_original(recipe, run)

    return dataclasses.replace(step, config=config, run=run_placed)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        with atomic_path(target) as temporary:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, temporary)


def take_shipped(recipe: Recipe, run: RunFolder, framework: str, shipped: Path) -> list[Path]:
    """Copy a shipped model and its log into the run, and repeat the first updates of its training."""
    set_threads(recipe)
    vocabulary = load_vocabulary(run)
    folder = training_folder(run, framework)
    with atomic_path(folder / "train.jsonl") as temporary:
        shutil.copyfile(shipped / "train.jsonl", temporary)
    with atomic_path(run.model(framework)) as temporary:
        shutil.copytree(shipped, temporary, ignore=shutil.ignore_patterns("train.jsonl"))
    live, _ = start_training(
        recipe,
        framework,
        vocabulary=vocabulary,
        utterances=load_split(run, "train", vocabulary),
        validation=[],
        folder=folder / "live",
        updates=LIVE_UPDATES,
    )
    live.train(f"live slice {framework}")
    remove(folder / "live" / "checkpoint")
    training = read_description(run.model(framework)).training
    _LOG.info(
        "  %s: shipped adapters (%d updates, %d tokens, %.0f minutes of training); %d updates repeated live: loss"
        " %.2f -> %.2f; %s",
        framework, training["updates"], training["tokens"], training["seconds"] / 60, len(live.log),
        live.log[0].loss, live.log[-1].loss, training_curve(run, framework).comparison(),
    )  # fmt: skip
    return [run.model(framework), folder / "train.jsonl", live.log_file]
