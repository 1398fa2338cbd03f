"""What an experiment measures of one model, as numbers by name; times, which take turns, are in `turns.py`."""

from collections.abc import Callable
from typing import cast

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from sparq.adaptation import add_lora, lora_preset, trainable_parameters
from sparq.papers.experiments import Cell, Measure
from sparq.papers.trained import TrainedCell
from sparq.recipes.outlier_sequences import TASK_LABELS
from sparq.recipes.train_step import training_folder
from sparq.report.drop import metrics
from sparq.training import Update, read_log
from sparq.types import Task

Values = dict[str, float | None]

OPT_SHAPES = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "opt-350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512},
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
}
"""The papers' backbones (Zhang et al. 2022); the MLP is four times as wide."""

_IN_THE_NAME = {"opt-125m": 125.0, "opt-350m": 350.0, "opt-1.3b": 1300.0}
"""Millions of parameters that table 11 divides by."""


def measure_tasks(trained: TrainedCell, cell: Cell) -> Values:
    """Return perplexities of text and speech, word error rate of ASR, and character error rate of TTS.

    Without a vocoder TTS has the error rate of its units instead.
    """
    row = trained.row(cell.precision)
    found = {name: getattr(row, name) for name in metrics([row])}
    return {name: None if metric is None else metric.value for name, metric in found.items()}


def measure_outliers(trained: TrainedCell, cell: Cell) -> Values:
    """Return the largest norm and the mean kurtosis of the layers' outputs, by task (SpARQ figure 3)."""
    outliers = trained.row(cell.precision).outliers
    assert outliers is not None
    return {
        f"{task} {name}": value
        for task, found in outliers.by_task.items()
        for name, value in (("max norm", found.max_inf_norm), ("kurtosis", found.mean_kurtosis))
    }


def measure_trajectory(trained: TrainedCell, cell: Cell) -> Values:
    """Return the largest norm of the layers' outputs on the validation set, by task, and when it fell.

    The norm is that after the first and after the last update, and the largest of all validations. Tokens are those of
    training until it stays below a tenth of the largest; None if it does not. It comes and goes, because a single
    sequence with a massive activation decides it.
    """
    log = [(update.tokens, update.valid_outliers) for update in _log(trained, cell) if update.valid_outliers]
    values: Values = {}
    for task in log[0][1] if log else ():
        norms = [found[task].max_norm for _, found in log]
        label = TASK_LABELS.get(cast(Task, task), task.upper())
        largest = max(norms)
        last_high = max(i for i, norm in enumerate(norms) if norm >= largest / 10)
        fell = float(log[last_high + 1][0]) if last_high + 1 < len(log) else None
        values |= {f"{label} first": norms[0], f"{label} largest": largest, f"{label} last": norms[-1]}
        values[f"{label} tokens"] = fell
    return values


def measure_attention(trained: TrainedCell, cell: Cell) -> Values:
    """Return where attention goes: the numbers behind the heat maps, which the experiment's page draws."""
    outliers = trained.row(cell.precision).outliers
    assert outliers is not None
    names = ("attention_mass", "first_token_share", "sink_rate", "attention_entropy")
    return {name.replace("_", " "): getattr(outliers, name) for name in names}


def measure_accuracy(trained: TrainedCell, cell: Cell) -> Values:
    """Return the next-token accuracy in percent of the best validation, at which the model was taken."""
    found = [update.valid_accuracy for update in _log(trained, cell) if update.valid_accuracy is not None]
    return {"accuracy": 100 * max(found) if found else None}


def _log(trained: TrainedCell, cell: Cell) -> list[Update]:
    return read_log(training_folder(trained.run, cell.framework) / "train.jsonl")


MEASURES: dict[Measure, Callable[[TrainedCell, Cell], Values]] = {
    "tasks": measure_tasks,
    "outliers": measure_outliers,
    "trajectory": measure_trajectory,
    "attention": measure_attention,
    "accuracy": measure_accuracy,
}
"""The measures of one trained model."""


def count_parameters(size: str) -> Values:
    """Return millions of LoRA parameters of one of the papers' backbones, as SpARQ's table 11 counts them.

    The counts come from the shapes alone. They are those of rank 128 on q, k, v and o, without embedding and head, and
    are divided by the number in the model's name.
    """
    shape = OPT_SHAPES[size]
    post_norm = shape["word_embed_proj_dim"] != shape["hidden_size"]
    config = OPTConfig(**shape, ffn_dim=4 * shape["hidden_size"], do_layer_norm_before=not post_norm)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapted = add_lora(model, lora_preset("table11", model))
    count = sum(p.numel() for name, p in trainable_parameters(adapted).items() if "lora_" in name) / 1e6
    whole = _IN_THE_NAME[size]
    return {"lora_parameters": count, "model_parameters": whole, "lora_share": 100 * count / whole}
