"""How much of an experiment is done: a tiny world, a small model on the speech at hand, or a recipe of one's own."""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sparq.errors import SparqError
from sparq.files import atomic_path, fingerprint, sha256_file
from sparq.papers.experiments import FULL, GROUPED, TUNED, Cell
from sparq.papers.smoke_world import smoke_recipe
from sparq.quantization import QuantizationScheme
from sparq.quantization.names import settings_of_name
from sparq.recipes.demo import shipped_steps
from sparq.recipes.jobs import Steps
from sparq.recipes.pipeline import STEPS
from sparq.recipes.recipe import Recipe, load_recipe, used_settings
from sparq.vocoder.storage import vocoder_files

_ADAPTATIONS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora", "base": "int8"},
    "qlora-4bit": {"method": "qlora", "base": "nf4"},
}


SMALL_OPT = "small-opt"
"""The profile of the small OPT, and the folder of its backbone."""

_SMALL_OPT_SETTINGS = (
    "name=sparq demo, small OPT",
    "train.dtype=float32",
    "train.updates=500",
    "train.warmup_updates=40",
    "train.validate_updates=100",
    "train.rank=16",
    "train.alpha=32",
    "train.learning_rate=5e-3",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where an experiment's models come from and how they are trained and measured.

    Attributes:
        name: `smoke`, `small` or `recipe`.
        recipe: everything that the cells of an experiment share.
        adaptations: settings of training that differ by adaptation, beside the method itself.
        quantization: settings of every scheme that trains, for example fewer epochs.
        tuned: settings of a precision that ends in `-tuned`.
        tuned_sequences: how many sequences it is calibrated on.
        grouped: settings of a precision that ends in `-grouped`.
        shipped: folder of models by framework that the recipe trained by LoRA with its own seed. Their k-means and
            vocabulary are taken: fitted anew on another processor they would differ, and the vocoder would not speak
            them. None to fit them.
        takes_models: whether these models are taken, too, instead of trained.
        rank_divisor: what the papers' ranks are divided by; 512 is more than the keys of a small model are wide.
    """

    name: str
    recipe: Recipe
    adaptations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 2, "low_rank": 16, "group_size": 64})
    tuned_sequences: int = 2048
    grouped: Mapping[str, Any] = field(default_factory=lambda: {"group_size": 64, "activation_granularity": "group"})
    shipped: Path | None = None
    takes_models: bool = False
    rank_divisor: int = 1

    def rank_of(self, cell: Cell) -> int:
        """Return the rank that stands for a cell's, the recipe's if the cell names none."""
        return cell.rank // self.rank_divisor or self.recipe.train.rank

    def recipe_of(self, cell: Cell, seed: int) -> Recipe:
        """Return the recipe of a cell's training; alpha keeps its share of the rank.

        The seed is of training. The speech keeps the recipe's own, so that all models speak the same units, those of
        the vocoder.

        Raises:
            SparqError: the settings contradict each other.
        """
        train = self.recipe.train
        settings = {**_ADAPTATIONS[cell.adaptation], **self.adaptations.get(cell.adaptation, {})}
        rank = self.rank_of(cell)
        own = None if seed == self.recipe.seed else seed
        changed = replace(train, **settings, rank=rank, alpha=rank * train.alpha // train.rank, seed=own)
        changed.validate("recipe.train")
        return replace(self.recipe, frameworks=(cell.framework,), train=changed)

    def ships(self, cell: Cell) -> bool:
        """Tell whether a cell's model is taken instead of trained."""
        if self.shipped is None or not self.takes_models:
            return False
        return (cell.adaptation, cell.rank) == ("lora", 0) and (self.shipped / cell.framework).is_dir()

    def steps_of(self, cell: Cell) -> Steps:
        """Return the steps that a cell's model is made by."""
        return STEPS if self.shipped is None else shipped_steps(self.shipped, train=self.ships(cell), live_updates=0)

    def settings_of(self, cell: Cell, seed: int) -> str:
        """Return a fingerprint of all that decides a cell's numbers, but for the recordings and where files lie."""
        recipe = self.recipe_of(cell, seed)
        spoken_by = (
            [sha256_file(file) for file in vocoder_files(recipe.evaluate.vocoder)] if recipe.evaluate.vocoder else []
        )
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, prose=None, vocoder=None))
        count = self.calibration_sequences(cell.precision)
        recipe = replace(recipe, quantize=replace(recipe.quantize, calibration_sequences=count))
        # Not what the profile gives: a method's defaults may become others.
        scheme = {} if cell.precision == FULL else self.scheme_of(cell.precision).chosen()
        used = used_settings(recipe, "units", "vocab", "train", "quantize", "evaluate")
        return fingerprint(used, scheme, spoken_by)

    def calibration_sequences(self, precision: str) -> int:
        """Return how many sequences a precision is calibrated on."""
        return self.tuned_sequences if TUNED in precision else self.recipe.quantize.calibration_sequences

    def scheme_of(self, precision: str) -> QuantizationScheme:
        """Return the scheme of a precision.

        `-clip5` leaves out 5 % of the weights, half of it at either end; `-tuned` is with the profile's own settings,
        `-grouped` with its groups.
        """
        name, clip, percent = precision.replace(TUNED, "").replace(GROUPED, "").partition("-clip")
        tails = {"weight_range": "percentile", "weight_tail": int(percent) / 100} if clip else {}
        named = settings_of_name(name)
        trained = self.quantization if named["method"] in ("omniquant", "affinequant") else {}
        tuned = self.tuned if TUNED in precision else {}
        grouped = self.grouped if GROUPED in precision else {}
        alpha = self.recipe.quantize.smoothing_alpha
        return QuantizationScheme.from_dict({**named, "smoothing_alpha": alpha, **tails, **trained, **tuned, **grouped})


def smoke_profile(folder: Path) -> Profile:
    """Return the tiny world: a random OPT of two layers on tones; its numbers mean nothing."""
    return Profile(
        name="smoke", recipe=smoke_recipe(folder), quantization={"epochs": 1},
        tuned={"epochs": 1, "low_rank": 2, "group_size": 16}, tuned_sequences=8,
        grouped={"group_size": 16, "activation_granularity": "group"}, rank_divisor=16,
    )  # fmt: skip


def small_profile(folder: Path, overrides: Iterable[str] = (), *, shipped: bool = False) -> Profile:
    """Return SmolLM2-135M on the demo's corpus of 62 minutes, by the demo's recipe.

    The rate of the recipe is LoRA's; all weights are trained at the papers' 3e-4. Its keys are 192 wide, so the ranks
    512, 256 and 128 are 128, 64 and 32 here.

    Args:
        folder: where the corpus goes.
        overrides: settings of the recipe such as `evaluate.tts_utterances=240`; results under other settings need
            another `name`.
        shipped: take the demo's adapters, which are those of seed 0, instead of training them again.
    """
    profile = _demo_profile(folder, overrides)
    if shipped and profile.shipped is None:
        raise SparqError("--shipped takes the demo's k-means and vocabulary: leave units and vocab as they are")
    return replace(
        profile, name="small", adaptations={"full": {"learning_rate": 3e-4}}, rank_divisor=4, takes_models=shipped
    )


def small_opt_profile(folder: Path, overrides: Iterable[str] = ()) -> Profile:
    """Return a small OPT of the papers' architecture on the demo's corpus: everything in minutes.

    It has 4 blocks, 256 wide, and was pretrained by `scripts/pretrain_opt.py`. The ranks 512, 256 and 128 are 64, 32
    and 16.

    Args:
        folder: where the corpus goes.
        overrides: settings of the recipe; results under other settings need another `name`.
    """
    with as_file(files("sparq") / "papers" / SMALL_OPT) as backbone:
        profile = _demo_profile(folder, [f"model.backbone={backbone}", *_SMALL_OPT_SETTINGS, *overrides])
    return replace(profile, name=SMALL_OPT, adaptations={"full": {"learning_rate": 1e-3}}, rank_divisor=8)


def _demo_profile(folder: Path, overrides: Iterable[str]) -> Profile:
    """Return the demo's recipe on its corpus, with its k-means and vocabulary unless these are changed."""
    with as_file(files("sparq") / "demo") as assets:
        if not (folder / "corpus").exists():
            with atomic_path(folder / "corpus") as temporary, zipfile.ZipFile(assets / "corpus.zip") as archive:
                archive.extractall(temporary)
        environ = {"SPARQ_DEMO_CORPUS": str((folder / "corpus").absolute())}
        plain, recipe = (load_recipe(assets / "demo.yaml", changes, environ=environ) for changes in ((), overrides))
    same_speech = (recipe.units, recipe.vocab) == (plain.units, plain.vocab)
    # Prose perplexity is of the backbone before adaptation: no experiment reads it.
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, prose=None))
    return Profile(name="demo", recipe=recipe, shipped=assets / "adapters" if same_speech else None)


def recipe_profile(path: Path, overrides: Iterable[str] = ()) -> Profile:
    """Return a profile of a recipe file, such as one of `recipes/paper`."""
    return Profile(name="recipe", recipe=load_recipe(path, overrides))
