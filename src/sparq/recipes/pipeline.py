"""The main job as steps: what each needs, reads and owns."""

from collections.abc import Iterable
from pathlib import Path

from sparq.audio.corpora import corpus_lists
from sparq.recipes.evaluate_step import run_evaluate
from sparq.recipes.jobs import FrameworkStep, Step
from sparq.recipes.quantize_step import run_quantize
from sparq.recipes.recipe import Recipe, used_settings
from sparq.recipes.report_step import run_report
from sparq.recipes.speech_steps import run_prepare, run_units, run_vocab
from sparq.recipes.train_step import run_train
from sparq.vocoder.storage import vocoder_files


def _lists(recipe: Recipe) -> Iterable[Path]:
    return [path for s in recipe.prepare.sources for path in corpus_lists(s.layout, s.path, s.subsets)]


def _prose_and_vocoder(recipe: Recipe) -> Iterable[Path]:
    prose, vocoder = recipe.evaluate.prose, recipe.evaluate.vocoder
    return [*([prose] if prose else []), *(vocoder_files(vocoder) if vocoder else [])]


STEPS: tuple[Step | FrameworkStep, ...] = (
    Step(
        name="prepare",
        needs=(),
        config=lambda recipe: used_settings(recipe, "prepare", "seed"),
        run=run_prepare,
        owns=("manifest.tsv", "prepare.json", "rejected.jsonl"),
        version=2,
        files=_lists,
    ),
    Step(
        name="units",
        needs=("prepare",),
        config=lambda recipe: used_settings(recipe, "units", "seed"),
        run=run_units,
        owns=("units",),
        files=lambda recipe: [recipe.units.kmeans] if recipe.units.kmeans else [],
    ),
    Step(
        name="vocab",
        needs=("units",),
        config=lambda recipe: used_settings(recipe, "vocab", "seed"),
        run=run_vocab,
        owns=("vocab",),
        files=lambda recipe: recipe.vocab.extra_text,
    ),
    FrameworkStep(
        name="train",
        needs=("units", "vocab"),
        config=lambda recipe: used_settings(recipe, "train", "model", "seed"),
        run=run_train,
        owns=("models/{framework}", "training/{framework}"),
        files=lambda recipe: recipe.train.extra_text,
    ),
    FrameworkStep(
        name="quantize",
        needs=("units", "train"),
        config=lambda recipe: used_settings(recipe, "quantize", "seed"),
        run=run_quantize,
        owns=("quantized/{framework}",),
    ),
    FrameworkStep(
        name="evaluate",
        needs=("units", "train", "quantize"),
        config=lambda recipe: used_settings(recipe, "evaluate", "quantize"),
        run=run_evaluate,
        owns=("evaluation/{framework}",),
        version=3,
        files=_prose_and_vocoder,
    ),
    Step(
        name="report",
        needs=("prepare", "units", "train", "evaluate"),
        config=lambda recipe: used_settings(recipe, "name"),
        run=run_report,
        owns=("results.json", "report.html", "clips"),
        version=3,
    ),
)
