"""A recipe: everything that decides what a run makes, read from one YAML file."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparq.configuration import apply_overrides, from_mapping, load_yaml, to_mapping
from sparq.errors import SparqError
from sparq.recipes.checks import ADDED_LATER, NO_EFFECT, check, check_not_empty
from sparq.recipes.model_sections import (
    FRAMEWORKS,
    EvaluateConfig,
    ModelConfig,
    QuantizeConfig,
    TaskWeights,
    TrainConfig,
    check_frameworks,
)
from sparq.recipes.speech_sections import PrepareConfig, SourceConfig, UnitsConfig, VocabConfig

__all__ = [
    "FRAMEWORKS",
    "EvaluateConfig",
    "ModelConfig",
    "PrepareConfig",
    "QuantizeConfig",
    "Recipe",
    "SourceConfig",
    "TaskWeights",
    "TrainConfig",
    "UnitsConfig",
    "VocabConfig",
    "load_recipe",
    "resolve_name",
    "resolve_paths",
    "used_settings",
]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, from recordings to report.

    Attributes:
        name: title of the run.
        prepare: which recordings are used.
        model: the pretrained LLM.
        train: how it is adapted.
        seed: seed of every random choice.
        threads: CPU threads; 0 for all cores.
        frameworks: the attentions to compare, everything else equal.
        units: how speech becomes units.
        vocab: the joint vocabulary.
        quantize: which low-bit models are made.
        evaluate: how much is evaluated.
    """

    name: str
    prepare: PrepareConfig
    model: ModelConfig
    train: TrainConfig
    seed: int = 0
    threads: int = field(default=0, metadata=NO_EFFECT)
    frameworks: tuple[str, ...] = FRAMEWORKS
    units: UnitsConfig = field(default_factory=UnitsConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def training_seed(self) -> int:
        """Seed of what training draws at random."""
        return self.seed if self.train.seed is None else self.train.seed

    def validate(self) -> None:
        """Check the values of every section and what they mean together.

        Raises:
            SparqError: a value is out of its range, or two sections contradict each other.
        """
        check_not_empty("recipe", name=self.name)
        # NumPy's and scikit-learn's seeds have 32 bits.
        check(0 <= self.seed < 2**32, "recipe.seed", self.seed, "from 0 to 4294967295")
        check(self.threads >= 0, "recipe.threads", self.threads, "at least 0")
        check_frameworks("recipe.frameworks", self.frameworks)
        for name in ("prepare", "units", "vocab", "model", "train", "quantize", "evaluate"):
            getattr(self, name).validate(f"recipe.{name}")
        corpora = {source.corpus for source in self.prepare.sources}
        for corpus in self.train.corpus_weights:
            check(corpus in corpora, "recipe.train.corpus_weights", corpus, f"one of {', '.join(sorted(corpora))}")
        right = f"more than recipe.units.k, {self.units.k}, because each unit is a piece"
        check(self.vocab.size > self.units.k, "recipe.vocab.size", self.vocab.size, right)


def load_recipe(path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Recipe:
    """Read, resolve and check a recipe.

    Relative paths start at the recipe's folder, also those in `overrides`, and become absolute.

    Args:
        path: the YAML file.
        overrides: settings such as `train.updates=10` that replace the file's.
        environ: environment variables for `${NAME}`; the process's by default.

    Raises:
        SparqError: anything about the recipe is wrong; the message is one line.
    """
    path = Path(path)
    mapping = apply_overrides(load_yaml(path), overrides)
    recipe = from_mapping(Recipe, mapping)
    recipe = resolve_paths(recipe, path.resolve().parent, os.environ if environ is None else environ)
    recipe.validate()
    return recipe


def resolve_paths(recipe: Recipe, folder: Path, environ: Mapping[str, str]) -> Recipe:
    """Return the recipe with environment variables put in and relative paths taken from `folder`.

    `units.features`, `model.backbone` and `evaluate.recognizer` may be hub names; see `resolve_name`.
    """

    def resolve(value: Path | str, where: str) -> Path:
        return _absolute(_expand(str(value), where, environ), folder)

    def resolve_optional(value: Path | None, where: str) -> Path | None:
        return None if value is None else resolve(value, where)

    sources = tuple(
        dataclasses.replace(
            source,
            manifest=resolve_optional(source.manifest, f"recipe.prepare.sources[{index}].manifest"),
            folder=resolve_optional(source.folder, f"recipe.prepare.sources[{index}].folder"),
        )
        for index, source in enumerate(recipe.prepare.sources)
    )
    texts = {
        section: tuple(resolve(text, f"recipe.{section}.extra_text[{index}]") for index, text in enumerate(files))
        for section, files in (("vocab", recipe.vocab.extra_text), ("train", recipe.train.extra_text))
    }
    prose = resolve_optional(recipe.evaluate.prose, "recipe.evaluate.prose")
    vocoder = resolve_optional(recipe.evaluate.vocoder, "recipe.evaluate.vocoder")
    recognizer = resolve_name(recipe.evaluate.recognizer, "recipe.evaluate.recognizer", folder, environ)
    kmeans = resolve_optional(recipe.units.kmeans, "recipe.units.kmeans")
    features = resolve_name(recipe.units.features, "recipe.units.features", folder, environ)
    backbone = resolve_name(recipe.model.backbone, "recipe.model.backbone", folder, environ)
    return dataclasses.replace(
        recipe,
        prepare=dataclasses.replace(recipe.prepare, sources=sources),
        units=dataclasses.replace(recipe.units, features=features, kmeans=kmeans),
        vocab=dataclasses.replace(recipe.vocab, extra_text=texts["vocab"]),
        train=dataclasses.replace(recipe.train, extra_text=texts["train"]),
        model=dataclasses.replace(recipe.model, backbone=backbone),
        evaluate=dataclasses.replace(recipe.evaluate, prose=prose, vocoder=vocoder, recognizer=recognizer),
    )


def resolve_name(value: str, where: str, folder: Path, environ: Mapping[str, str]) -> str:
    """Return a reference to a model with environment variables put in and, if it is a path then, absolute.

    It may be a hub name, so it counts as a path only if it starts with `.`, `~` or `/`.

    Args:
        value: the reference.
        where: its place in the recipe, for messages.
        folder: where relative paths start.
        environ: environment variables for `${NAME}`.
    """
    text = _expand(value, where, environ)
    return str(_absolute(text, folder)) if text.startswith((".", "~", "/")) else text


def used_settings(recipe: Recipe, *names: str) -> dict[str, Any]:
    """Return the settings that a step reads, as nested mappings: what its stamp is made from.

    Fields that change how a step runs but not what it makes (`prepare.skip_bad`, `train.checkpoint_updates`)
    are left out, and those that are newer than runs may be (`train.extra_text`) where they have their default.

    Args:
        recipe: the recipe.
        *names: top-level fields, such as `units` and `seed`, or fields of a section, such as `units.k`.
    """
    result: dict[str, Any] = {}
    for name in names:
        section, _, inner = name.partition(".")
        value = getattr(recipe, section)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            result[section] = list(value) if isinstance(value, tuple) else value
            continue
        ignored = {
            f.name
            for f in dataclasses.fields(value)
            if f.metadata == NO_EFFECT or (f.metadata == ADDED_LATER and getattr(value, f.name) == f.default)
        }
        mapping = {key: item for key, item in to_mapping(value).items() if key not in ignored}
        if inner:
            result.setdefault(section, {})[inner] = mapping[inner]
        else:
            result[section] = mapping
    return result


def _absolute(text: str, folder: Path) -> Path:
    # normpath, not resolve(): a symbolic link to a corpus keeps its name in messages and manifests.
    return Path(os.path.normpath(folder / Path(text).expanduser()))


def _expand(text: str, where: str, environ: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not environ.get(name):
            raise SparqError(f"{where} is {text!r}, but the environment variable {name} is not set: export {name}=...")
        return environ[name]

    return _VARIABLE.sub(value, text)
