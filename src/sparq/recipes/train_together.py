"""`sparq train` on several processes: the first does the step as ever, the others train along with it."""

import os
import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sparq.errors import SparqError
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder

_LETTING_GO = 0.2  # seconds in which gloo's threads end what they are at


def check_processes(step: str | None) -> None:
    """Refuse several processes for anything but training.

    Raises:
        SparqError: a launcher started several for another step.
    """
    if _count() > 1 and step != "train":
        raise SparqError(
            f"{_count()} processes were started, but only `sparq train` shares its work among them: start"
            f" `sparq {step or 'run'}` once, up to the training by `sparq run --until vocab`"
        )


def is_follower() -> bool:
    """Whether this process only trains along."""
    return int(os.environ.get("RANK", "0")) > 0 and _count() > 1


def announce(framework: str | None) -> None:
    """Tell the followers which framework is trained next, or that there is no more."""
    if _count() > 1:
        _broadcast(framework)


def follow(recipe: Recipe, run: RunFolder) -> None:
    """Train along until there is no more."""
    from sparq.recipes.train_step import train_framework

    while (framework := _broadcast(None)) is not None:
        # What goes wrong in training does so in every process, and the first one says it.
        try:
            train_framework(recipe, run, framework)
        except SparqError:
            continue


def leave() -> None:
    """Close what the processes talk through: a thread of gloo's that is left at exit may end a process by an abort.

    Right behind a collective that can stop for good: gloo's thread wants Python's lock to let go of tensors, and the
    end of the process group holds it while it waits for that thread (PyTorch 2.13).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_LETTING_GO)
        torch.distributed.destroy_process_group()


def _broadcast(framework: str | None) -> str | None:
    PartialState(cpu=not torch.cuda.is_available())
    message = [framework]
    broadcast_object_list(message)
    return message[0]


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
