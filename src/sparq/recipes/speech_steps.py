"""The steps from recordings to the joint vocabulary: prepare, units, vocab."""

import logging
import os
from pathlib import Path

import torch

from sparq.audio.manifest import read_manifest
from sparq.audio.prepare import Source, prepare
from sparq.audio.splits import HeldOut
from sparq.audio.summary import format_report
from sparq.data.text_lines import read_texts
from sparq.errors import SparqError
from sparq.pretrained import resolve_model
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.tokens import JointVocabulary, fit_vocabulary
from sparq.tokens.special import units_to_text
from sparq.tokens.vocabulary import DESCRIPTION_FILE, as_line
from sparq.units import (
    EncodeSettings,
    FeatureSpec,
    KMeans,
    KMeansSettings,
    ShardRunner,
    ShardWork,
    encode_in_processes,
    encode_on_ray,
    encode_units,
    fit_units,
    load_extractor,
    read_units,
    take_units,
)

_LOG = logging.getLogger(__name__)


def set_threads(recipe: Recipe) -> None:
    """Let PyTorch use as many threads as the recipe says; 0 leaves its own choice."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)


def run_prepare(recipe: Recipe, run: RunFolder) -> list[Path]:
    """Check every recording, split the corpora and write the manifest."""
    sources = [
        Source(
            path=source.path,
            corpus=source.corpus,
            format=source.layout,
            subsets=source.subsets,
            splits=source.splits,
            held_out=HeldOut(
                test_speakers=source.test_speakers,
                test_fraction=source.test_fraction,
                valid_fraction=source.valid_fraction,
                speaker_disjoint=source.speaker_disjoint,
                test_split=source.test_split,
                seed=recipe.seed,
            ),
        )
        for source in recipe.prepare.sources
    ]
    report = prepare(sources, out=run.path, skip_bad=recipe.prepare.skip_bad, max_seconds=recipe.prepare.max_seconds)
    for line in format_report(report).splitlines():
        _LOG.info("  %s", line)
    return [run.manifest, run.prepare, run.rejected]


def feature_spec(features: str, layer: int, dtype: str) -> FeatureSpec:
    """Return what to extract; `hubert` is HuBERT-base by its hub name, and MFCC has no layers."""
    if features == "mfcc":
        return FeatureSpec(model="mfcc")
    model = "facebook/hubert-base-ls960" if features == "hubert" else resolve_model(features)
    return FeatureSpec(model=model, layer=layer, dtype=dtype)


def _shard_runner(recipe: Recipe, spec: FeatureSpec, kmeans: Path) -> ShardRunner | None:
    units = recipe.units
    work = ShardWork(features=spec, kmeans=kmeans, dedup=units.dedup)
    if units.ray is not None:
        return encode_on_ray(work, units.ray, units.workers or os.cpu_count() or 1)
    return encode_in_processes(work, units.workers) if units.workers else None


def run_units(recipe: Recipe, run: RunFolder) -> list[Path]:
    """Fit the k-means on the training split, or take the one that is named, and encode every split."""
    set_threads(recipe)
    utterances = read_manifest(run.manifest)
    if not any(u.split == "train" for u in utterances):
        raise SparqError(f"{run.manifest} has no training utterances: hold out less, or give more recordings")
    spec = feature_spec(recipe.units.features, recipe.units.layer, recipe.units.dtype)
    extractor = load_extractor(spec)
    if recipe.units.kmeans:
        kmeans = take_units(recipe.units.kmeans, extractor, run.units, k=recipe.units.k)
    else:
        kmeans = fit_units(
            utterances,
            extractor,
            run.units,
            KMeansSettings(k=recipe.units.k, seed=recipe.seed, num_starts=recipe.units.n_init),
            max_frames=recipe.units.max_frames,
        )
    settings = EncodeSettings(dedup=recipe.units.dedup, shard_utterances=recipe.units.shard_utterances)
    runner = _shard_runner(recipe, spec, run.kmeans)
    encode_units(utterances, extractor, kmeans, run.units, settings, runner=runner)
    return [run.units]


def run_vocab(recipe: Recipe, run: RunFolder) -> list[Path]:
    """Fit the joint vocabulary on the training split's units and text, unless a whole one of these units is there."""
    kmeans = KMeans.load(run.kmeans)
    if (run.vocab / DESCRIPTION_FILE).exists():
        JointVocabulary.load(run.vocab, units_fingerprint=kmeans.fingerprint)
        return [run.vocab]
    lines: list[str] = []
    for utterance in read_units(run.units, "train", expect_fingerprint=kmeans.fingerprint):
        lines.append(units_to_text(utterance.units.tolist()))
        lines += [as_line(utterance.text)] * recipe.vocab.text_repeat if utterance.text else []
    for file in recipe.vocab.extra_text:
        for text in read_texts(file, most=recipe.vocab.extra_lines, seed=recipe.seed):
            lines += [as_line(text)] * recipe.vocab.text_repeat
    vocabulary = fit_vocabulary(
        lines,
        size=recipe.vocab.size,
        num_units=kmeans.k,
        units_fingerprint=kmeans.fingerprint,
        model_type=recipe.vocab.model_type,
    )
    vocabulary.save(run.vocab)
    return [run.vocab]
