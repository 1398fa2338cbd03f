"""The sequences that outliers are measured on, by task."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparq.evaluation import OutlierReport, measure_outliers
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.types import Task

TASK_LABELS: dict[Task, str] = {"textlm": "TextLM", "speechlm": "SpeechLM", "asr": "ASR"}
"""The tasks of SpARQ figure 3 and their names there: text, speech, and speech with the text that was said."""


def task_sequences(
    vocabulary: JointVocabulary, task: Task, utterances: Iterable[tuple[str, Sequence[int]]]
) -> list[Tensor]:
    """Return the sequences of one task; utterances are text and units, and one that lacks what it needs is left out."""
    return [
        sequence_ids(make_example(vocabulary, task, text=text, units=units))
        for text, units in utterances
        if (text or task == "speechlm") and (units or task == "textlm")
    ]


def sequence_ids(example: Example) -> Tensor:
    """Return prompt and target as one sequence of token ids."""
    return torch.tensor((*example.prompt, *example.target))


def alone(sequences: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Return batches of one sequence each, without padding."""
    return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in sequences]


def measure_tasks(model: PreTrainedModel, tasks: Mapping[str, Sequence[Tensor]]) -> dict[str, OutlierReport]:
    """Measure every task that has sequences."""
    return {name: measure_outliers(model, alone(sequences)) for name, sequences in tasks.items() if sequences}
