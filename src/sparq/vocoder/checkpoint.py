"""The resumable state of a vocoder's training: safetensors and JSON, whole or absent."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """How far a training has come.

    Attributes:
        key: fingerprint of the settings and data that it was started with.
        updates: optimizer steps done.
        seconds: time spent, over all sessions.
    """

    key: str
    updates: int = 0
    seconds: float = 0.0


def save_state(
    folder: Path,
    progress: TrainProgress,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """Write a checkpoint in place of the one before."""
    tensors = {
        f"{part}/{name}": tensor.detach().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for part, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}/{index}/{name}": tensor.contiguous() for name, tensor in state.items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "state.safetensors")
        write_json(temporary / "progress.json", dataclasses.asdict(progress))


def load_state(
    folder: Path,
    key: str,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> TrainProgress | None:
    """Restore what `save_state` wrote, if there is a checkpoint; return how far it had come.

    Raises:
        SparqError: it was made with other settings or data.
    """
    if not (folder / "progress.json").exists():
        return None
    progress = TrainProgress(**read_json(folder / "progress.json"))
    if progress.key != key:
        raise SparqError(f"{folder} is of a training with other settings or data: remove it, or restore them, to go on")
    tensors = load_file(folder / "state.safetensors")
    for part, module in modules.items():
        module.load_state_dict(_below(tensors, part))
    for part, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, part).items():
            index, _, field = name.partition("/")
            state.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
