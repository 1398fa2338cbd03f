"""The step that turns the pretrained LLM into a SpeechLM, once for each framework."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sparq.adaptation import (
    LoraSettings,
    SpeechLMDescription,
    add_lora,
    count_parameters,
    save_speechlm,
    trainable_parameters,
)
from sparq.attention import SCHEDULED, AttentionSpec
from sparq.data import Batch, collate, training_batches
from sparq.data.batching import EpochExamples, epoch_examples, group_by_length
from sparq.errors import SparqError
from sparq.files import fingerprint
from sparq.models import build_speechlm
from sparq.models.loading import LoadedBackbone
from sparq.models.speechlm import JointEmbedding
from sparq.pretrained import resolve_model
from sparq.recipes.recipe import Recipe, used_settings
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.text_alone import text_alone
from sparq.recipes.train_together import announce
from sparq.tokens import JointVocabulary
from sparq.tokens.special import PAD
from sparq.training import TrainingRun, TrainingSettings
from sparq.types import TASKS
from sparq.units import KMeans, UnitUtterance, read_summary, read_units

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

EVA_BATCHES = 32
"""How many of the first micro-batches EVA reads, over and over until its directions settle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoken:
    """An utterance as lists, which tokenizing is fastest on."""

    id: str
    speaker: str
    corpus: str
    text: str
    units: list[int]
    seconds: float


def as_spoken(utterance: UnitUtterance) -> Spoken:
    """Return a stored utterance in that form."""
    return Spoken(
        id=utterance.id,
        speaker=utterance.speaker,
        corpus=utterance.corpus,
        text=utterance.text,
        units=utterance.units.tolist(),
        seconds=utterance.seconds,
    )


def load_split(run: RunFolder, split: str, vocabulary: JointVocabulary) -> list[Spoken]:
    """Return a split of the units that the vocabulary belongs to; a split that the corpora lack is empty."""
    if split not in read_summary(run.units)["splits"]:
        return []
    return [as_spoken(u) for u in read_units(run.units, split, expect_fingerprint=vocabulary.units_fingerprint)]


def load_vocabulary(run: RunFolder) -> JointVocabulary:
    """Return the run's vocabulary, checked against its units."""
    return JointVocabulary.load(run.vocab, units_fingerprint=KMeans.load(run.kmeans).fingerprint)


def training_settings(recipe: Recipe, framework: str) -> TrainingSettings:
    """Return the settings of the loop."""
    names = {field.name for field in dataclasses.fields(TrainingSettings)} - {"betas", "stop_after", "sink_updates"}
    return TrainingSettings(
        **{name: getattr(recipe.train, name) for name in names},
        sink_updates=recipe.train.sink_updates if AttentionSpec.parse(framework).normalization in SCHEDULED else 0,
    )


Stream = Callable[[int], Iterator[Batch]]
"""Gives the micro-batches of a training from a given number on."""


def stream_options(recipe: Recipe, utterances: list[Spoken], texts: EpochExamples | None = None) -> dict[str, Any]:
    """Return what `training_batches` and `epoch_groups` are told about the batches of a training split.

    Raises:
        SparqError: nothing is left to train on.
    """
    train = recipe.train
    weights = {task: getattr(train.task_weights, task) for task in TASKS}
    if not any(u.text for u in utterances) and not weights["speechlm"]:
        raise SparqError("no training utterance has text, and task_weights.speechlm is 0: nothing to train on")

    # An epoch may show a corpus more often than another, or not at all.
    shares = np.array([train.corpus_weights.get(u.corpus, 1.0) for u in utterances])
    if not shares.any():
        raise SparqError(f"train.corpus_weights {train.corpus_weights} leave no training utterance: raise one above 0")
    return {
        "weights": weights,
        "batch_tokens": train.batch_tokens,
        "seed": recipe.training_seed,
        "long_length": train.long_length if train.packing else None,
        "unit_noise": train.unit_noise,
        "shares": shares,
        "temperature": train.task_temperature,
        "extra": texts,
    }


def training_stream(
    recipe: Recipe, vocabulary: JointVocabulary, utterances: list[Spoken], texts: EpochExamples | None = None
) -> Stream:
    """Return the stream of a training split and of text alone.

    Raises:
        SparqError: nothing is left to train on.
    """
    options, pad = stream_options(recipe, utterances, texts), vocabulary.token_id(PAD)

    def batches(skip: int) -> Iterator[Batch]:
        return training_batches(utterances, vocabulary, pad_id=pad, skip=skip, **options)

    return batches


def build_model(
    recipe: Recipe, framework: str, vocabulary: JointVocabulary, batches: Stream
) -> tuple[PreTrainedModel | PeftModel, LoadedBackbone, JointEmbedding]:
    """Return the backbone with this framework's attention, the joint vocabulary and adapters, ready to be trained."""
    dtype, lora = DTYPES[recipe.train.dtype], lora_settings(recipe)
    # The seed decides adapters, new rows, order and dropout, the same for every framework.
    torch.manual_seed(recipe.training_seed)
    loaded, embedding = build_speechlm(
        resolve_model(recipe.model.backbone),
        vocabulary,
        attention=framework,
        dtype=torch.float32 if lora and lora.reads_weights else dtype,
        noise=recipe.model.new_row_noise,
        seed=recipe.training_seed,
    )
    if lora is None:
        return loaded.model, loaded, embedding
    first = itertools.islice(batches(0), EVA_BATCHES if lora.initialization == "eva" else 0)
    return add_lora(loaded.model, lora, dtype=dtype, batches=first), loaded, embedding


def lora_settings(recipe: Recipe) -> LoraSettings | None:
    """Return the adapters' settings, None for full fine-tuning."""
    train = recipe.train
    if train.method == "full":
        return None
    names = {field.name for field in dataclasses.fields(LoraSettings)} - {"base"}
    base = train.base if train.method == "qlora" else None
    return LoraSettings(base=base, **{name: getattr(train, name) for name in names})


def start_training(
    recipe: Recipe, framework: str, *, vocabulary: JointVocabulary, utterances: list[Spoken],
    validation: list[Spoken], folder: Path, texts: EpochExamples | None = None, updates: int | None = None,
) -> tuple[TrainingRun, SpeechLMDescription]:  # fmt: skip
    """Load the backbone with this framework's attention and set up its training, or go on with it.

    Args:
        recipe: what to do.
        framework: the attention.
        vocabulary: the joint vocabulary.
        utterances: the training split.
        validation: the validation split; may be empty.
        folder: where the training's state lives.
        texts: examples of text alone.
        updates: stop after so many, with the schedule as for the recipe's.
    """
    train = recipe.train
    batches = training_stream(recipe, vocabulary, utterances, texts)
    model, loaded, embedding = build_model(recipe, framework, vocabulary, batches)
    settings = dataclasses.replace(training_settings(recipe, framework), stop_after=updates)
    run = TrainingRun(
        model,
        folder,
        settings=settings,
        key=fingerprint(used_settings(recipe, "train", "model", "seed"), framework, vocabulary.fingerprint),
        batches=batches,
        validation=validation_batches(validation, vocabulary, batch_tokens=train.batch_tokens, seed=recipe.seed),
    )
    description = SpeechLMDescription(
        backbone=recipe.model.backbone,
        backbone_checksum=loaded.checksum,
        attention=framework,
        method=train.method,
        base=train.base if train.method == "qlora" else None,
        vocabulary_fingerprint=vocabulary.fingerprint,
        units_fingerprint=vocabulary.units_fingerprint,
        training={
            "trained_parameters": count_parameters(list(trainable_parameters(model).values())),
            "backbone_parameters": loaded.num_parameters,
            "backbone_tensors": loaded.num_tensors,
            "copied_rows": embedding.num_copied,
            "settings": used_settings(recipe, "train", "model", "seed"),
            "units": used_settings(recipe, "units")["units"],
        },
    )
    return run, description


def validation_batches(
    utterances: list[Spoken], vocabulary: JointVocabulary, *, batch_tokens: int, seed: int
) -> dict[str, list[Batch]]:
    """Return every validation utterance as each task that it can be, for next-token accuracy."""
    batches: dict[str, list[Batch]] = {}
    for task in TASKS:
        weights = {other: float(other == task) for other in TASKS}
        usable = [u for u in utterances if u.text or task == "speechlm"]
        if usable:
            examples = epoch_examples(usable, vocabulary, weights=weights, seed=seed, epoch=0)
            groups = group_by_length(examples, batch_tokens=batch_tokens, random=np.random.default_rng(seed))
            batches[task] = [collate(group, pad_id=vocabulary.token_id(PAD)) for group in groups]
    return batches


def training_folder(run: RunFolder, framework: str) -> Path:
    """Where a framework's training keeps its log and, until it is done, its state."""
    return run.path / "training" / framework


def run_train(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
    """Adapt the backbone under one framework and write the model folder."""
    announce(framework)
    model, training, description = train_framework(recipe, run, framework)
    progress = training.progress
    outcome = {
        "updates": progress.updates,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "processes": training.workers.count,
        "selected_update": progress.best_update or progress.updates,
        "averaged_updates": [update for _, update in progress.best],
    }
    save_speechlm(
        run.model(framework),
        model,
        vocabulary=load_vocabulary(run),
        kmeans_file=run.kmeans,
        description=dataclasses.replace(description, training={**description.training, **outcome}),
    )
    training.remove_state()
    return [run.model(framework), training.log_file]


def train_framework(
    recipe: Recipe, run: RunFolder, framework: str
) -> tuple[PreTrainedModel | PeftModel, TrainingRun, SpeechLMDescription]:
    """Train to the end and return the model, whole: what every process of a training does."""
    set_threads(recipe)
    vocabulary = load_vocabulary(run)
    utterances = load_split(run, "train", vocabulary)
    with text_alone(recipe, run, vocabulary) as texts:
        training, description = start_training(
            recipe,
            framework,
            vocabulary=vocabulary,
            utterances=utterances,
            validation=load_split(run, "valid", vocabulary),
            folder=training_folder(run, framework),
            texts=texts,
        )
        training.train(f"train {framework}")
        if not training.is_sharded:
            return training.model, training, description
        weights = training.optimizer.whole_weights(training.names)
        stream = training_stream(recipe, vocabulary, utterances, texts)
        model, *_ = build_model(recipe, framework, vocabulary, stream)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(weights[name])
    return model, training, description
