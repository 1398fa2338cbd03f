"""Calibration data of SpeechLMs: training sequences of the joint token stream, in equal parts of the tasks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparq.data import collate
from sparq.data.batching import Spoken
from sparq.errors import SparqError
from sparq.tokens import Example, JointVocabulary, make_example
from sparq.tokens.special import PAD
from sparq.types import TASKS, Task

_BATCH = 16


def task_examples(
    utterances: Sequence[Spoken],
    vocabulary: JointVocabulary,
    *,
    tasks: Sequence[Task] = TASKS,
    count: int | None = None,
    tokens: int | None = None,
    fewer: bool = False,
    seed: int,
) -> dict[Task, list[Example]]:
    """Return random sequences of each task, none twice, in equal parts by their number or by their tokens.

    Speech takes several times the tokens of its text, so equal numbers of sequences are mostly speech.

    Args:
        utterances: the training split; those without transcript are used as `speechlm` only.
        vocabulary: the joint vocabulary.
        tasks: which; `textlm` is text alone, `speechlm` speech alone, and `asr` and `tts` have both.
        count: sequences of all tasks together, or
        tokens: tokens of all tasks together, at least; the last sequence of a task goes over.
        fewer: take what there is if that is fewer tokens.
        seed: of the choice; a task's does not depend on the others.

    Raises:
        SparqError: the split has fewer tokens of a task than asked for, or none. Fewer sequences are taken as they are.
    """
    assert (count is None) != (tokens is None), "give one of count and tokens"
    chosen: dict[Task, list[Example]] = {}
    for index, task in enumerate(TASKS):
        if task not in tasks:
            continue
        usable = [u for u in utterances if u.text or task == "speechlm"]
        generator = torch.Generator().manual_seed(seed * len(TASKS) + index)
        order = torch.randperm(len(usable), generator=generator).tolist()
        if count is not None:
            place = [other for other in TASKS if other in tasks].index(task)
            order = order[: count // len(tasks) + (place < count % len(tasks))]
        found = (make_example(vocabulary, task, text=usable[i].text, units=usable[i].units) for i in order)
        chosen[task] = list(found) if tokens is None else _up_to(found, -(-tokens // len(tasks)), task, fewer=fewer)
    return chosen


def padded_batches(
    examples: Mapping[Task, Sequence[Example]], vocabulary: JointVocabulary
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of sequences of like length of all tasks, with a mask that leaves padding out, and labels.

    Short and long batches take turns at random: a part of them is like the whole, for methods that look at the first.
    """
    ordered = sorted((example for of_task in examples.values() for example in of_task), key=len)
    starts = torch.arange(0, len(ordered), _BATCH)
    for start in starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(0))].tolist():
        batch = collate(ordered[start : start + _BATCH], pad_id=vocabulary.token_id(PAD))
        mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
        yield {"input_ids": batch.input_ids, "attention_mask": mask.long(), "labels": batch.labels}


def _up_to(examples: Iterable[Example], tokens: int, task: Task, *, fewer: bool) -> list[Example]:
    taken: list[Example] = []
    total = 0
    for example in examples:
        if total >= tokens:
            break
        taken.append(example)
        total += len(example)
    if total < tokens and not (fewer and taken):
        raise SparqError(f"the split has {total} tokens of {task}, fewer than the {tokens} asked for: ask for fewer")
    return taken
