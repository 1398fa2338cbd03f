"""Checkpoints of a run: safetensors and JSON, whole or absent."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json
from sparq.training.best import Best


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        key: fingerprint of the settings that the run was started with.
        updates: optimizer steps done.
        batches: micro-batches consumed, over all epochs and processes.
        tokens: tokens processed, padding left out.
        seconds: time spent training, over all sessions of the run.
        best: validations whose weights are kept.
    """

    key: str
    updates: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best = ()

    @property
    def best_update(self) -> int:
        """The update of the highest validation accuracy, 0 before the first."""
        return self.best[0][1] if self.best else 0


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint in place of the one before."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "progress.json", dataclasses.asdict(progress))


def load_checkpoint(folder: Path, key: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """Return the checkpoint in `folder`, if there is one.

    Raises:
        SparqError: it was made with other settings.
    """
    if not (folder / "progress.json").exists():
        return None
    content: dict[str, Any] = read_json(folder / "progress.json")
    content["best"] = tuple((accuracy, update) for accuracy, update in content["best"])
    progress = Progress(**content)
    if progress.key != key:
        raise SparqError(f"{folder} is of a run with other settings: remove it, or restore the settings, to go on")
    return progress, load_file(folder / "state.safetensors")
