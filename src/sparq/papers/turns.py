"""The times that experiments measure: of all their models in one process, in turns, so that no busy minute bends one.

Measured one after another on a shared machine, the same model took 8.3 ms beside one job and 13.3 beside another.
Models are not trained for it: how long they take does not depend on what they have learned.
"""

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparq.bench.interleaved import Ratio, interleave
from sparq.devices import compute_device, synchronize
from sparq.models import build_speechlm
from sparq.papers.experiments import FULL, Cell
from sparq.papers.measures import Values
from sparq.papers.trained import PreparedCell
from sparq.pretrained import resolve_model
from sparq.quantization import to_integers
from sparq.recipes.outlier_sequences import TASK_LABELS, task_sequences
from sparq.recipes.text_alone import text_alone
from sparq.recipes.train_step import load_split, start_training
from sparq.types import Task

_LATENCIES: dict[Task, str] = {task: f"{TASK_LABELS[task].lower()}_latency" for task in ("textlm", "speechlm")}
"""The metric of each task whose latency is measured."""

_TRAINING_TIME = "seconds_per_1000_tokens"
"""The metric of the time of training: what the papers call an epoch is not known."""

_SEQUENCES = 8
_LATENCY_ROUNDS, _TRAINING_ROUNDS = 15, 7

Timed = tuple[dict[Cell, Values], str]
"""The times of each model, and what to know about them."""


def measure_latency(models: Mapping[Cell, PreparedCell]) -> Timed:
    """Return milliseconds of a forward pass of one sequence; a quantized model computes with integers.

    None where no test utterance has what a task reads.

    Args:
        models: the first one is compared with.
    """
    calls = {cell: _untrained(prepared, cell.precision) for cell, prepared in models.items()}
    first = next(iter(models.values()))
    pairs = [(u.text, u.units) for utterances in first.splits.values() for u in utterances][:_SEQUENCES]
    sequences = {task: task_sequences(first.vocabulary, task, pairs) for task in _LATENCIES}
    values: dict[Cell, Values] = {cell: dict.fromkeys(_LATENCIES.values()) for cell in models}
    steady = []
    for task, metric in _LATENCIES.items():
        if not sequences[task]:
            continue
        runs = {cell: functools.partial(_forward, model, sequences[task]) for cell, model in calls.items()}
        ratios = _interleave(runs, rounds=_LATENCY_ROUNDS)
        steady.append(ratios[next(iter(models))])
        for cell, seconds in times_of(ratios).items():
            values[cell][metric] = 1000 * seconds / len(sequences[task])
    return values, _note(steady, rounds=_LATENCY_ROUNDS)


def measure_training(models: Mapping[Cell, PreparedCell]) -> Timed:
    """Return seconds of training by 1,000 tokens: the updates of all models on the first update's micro-batches.

    Args:
        models: the first one is compared with.
    """
    with contextlib.ExitStack() as stack:
        updates, tokens = {}, 0
        for cell, prepared in models.items():
            updates[cell], tokens = _update(prepared, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ratios = _interleave(updates, rounds=_TRAINING_ROUNDS)
    values: dict[Cell, Values] = {
        cell: {_TRAINING_TIME: 1000 * seconds / tokens} for cell, seconds in times_of(ratios).items()
    }
    return values, _note([ratios[next(iter(models))]], rounds=_TRAINING_ROUNDS)


def _untrained(prepared: PreparedCell, precision: str) -> PreTrainedModel:
    """Return the model as it is before training; adapters would be merged."""
    recipe = prepared.recipe
    backbone = resolve_model(recipe.model.backbone)
    loaded, _ = build_speechlm(
        backbone, prepared.vocabulary, attention=prepared.cell.framework, noise=recipe.model.new_row_noise,
        seed=recipe.training_seed,
    )  # fmt: skip
    model = loaded.model.to(compute_device()).eval()
    return model if precision == FULL else to_integers(prepared.quantized(model, precision))


@torch.inference_mode()
def _forward(model: PreTrainedModel, sequences: Sequence[Tensor]) -> None:
    for ids in sequences:
        model(ids[None].to(model.device))


def _update(prepared: PreparedCell, folder: Path) -> tuple[Callable[[], object], int]:
    """Return a call that makes an update, ever of the same micro-batches, and the tokens of these."""
    recipe, run = prepared.recipe, prepared.run
    vocabulary = prepared.vocabulary
    with text_alone(recipe, run, vocabulary) as texts:
        training, _ = start_training(
            recipe, prepared.cell.framework, vocabulary=vocabulary, utterances=load_split(run, "train", vocabulary),
            validation=[], folder=folder, texts=texts,
        )  # fmt: skip
        batches = list(itertools.islice(training.stream, recipe.train.accumulate))
    training.stream = itertools.cycle(batches)
    training.loss.train()
    return training._update, int(sum(batch.num_tokens for batch in batches))


def _interleave(runs: Mapping[Cell, Callable[[], object]], *, rounds: int) -> dict[Cell, Ratio]:
    named = {" ".join(map(str, (c.framework, c.adaptation, c.rank, c.precision))): c for c in runs}
    device = compute_device()
    ratios = interleave(
        {name: runs[cell] for name, cell in named.items()},
        baseline=next(iter(named)), rounds=rounds, least_seconds=0.1, synchronize=lambda: synchronize(device),
    )  # fmt: skip
    return {cell: ratios[name] for name, cell in named.items()}


def times_of(ratios: Mapping[Cell, Ratio]) -> dict[Cell, float]:
    """Return times whose ratios to the first are the medians of those within rounds, which are what is steady."""
    first = next(iter(ratios))
    return {cell: ratios[first].seconds * (1.0 if cell == first else ratio.median) for cell, ratio in ratios.items()}


def _note(steady: Sequence[Ratio], *, rounds: int) -> str:
    if not steady:
        return "No test utterance has text or units."
    low, high = min(ratio.low for ratio in steady), max(ratio.high for ratio in steady)
    return (
        f"Taken in turns, {rounds} rounds; the first model took {low:.2f} to {high:.2f} times as long as itself"
        " (quartiles)."
    )
