"""Checkpoints of a run: safetensors and JSON, whole or absent."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json

RANDOM_STATE = "random_state"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        key: fingerprint of the settings that the run was started with.
        updates: optimizer steps done.
        batches: micro-batches consumed, over all epochs.
        tokens: padded tokens processed.
        seconds: time spent training, over all sessions of the run.
        best_accuracy: highest validation accuracy so far (negative: none yet).
        best_update: the update it was reached at.
    """

    key: str
    updates: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_update: int = 0


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint in place of the one before, with the random state (dropout's)."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file({**contents, RANDOM_STATE: torch.get_rng_state()}, temporary / "state.safetensors")
        write_json(temporary / "progress.json", dataclasses.asdict(progress))


def load_checkpoint(folder: Path, key: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """Return the checkpoint in `folder`, if there is one, and set the random state.

    Raises:
        SparqError: it was made with other settings.
    """
    if not (folder / "progress.json").exists():
        return None
    content: dict[str, Any] = read_json(folder / "progress.json")
    progress = Progress(**content)
    if progress.key != key:
        raise SparqError(f"{folder} is of a run with other settings: remove it, or restore the settings, to go on")
    tensors = load_file(folder / "state.safetensors")
    torch.set_rng_state(tensors.pop(RANDOM_STATE))
    return progress, tensors
