"""Finished blocks of an unfinished quantization, in a folder, so that an interrupted one goes on.

A block is a file, `block-0007.safetensors`, with the integers, scales and zero points of its linear layers.
`resume.json` has fingerprints of what they were made from. Files are whole or absent.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.files import atomic_path, fingerprint, read_json, write_json
from sparq.models.conversion import saved_attention
from sparq.quantization.grid import Grid
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.scheme import QuantizationScheme

_KEY = "resume.json"

Rounded = Mapping[str, tuple[Grid, Tensor]]
"""Grid and integers of each linear layer of a block, by its name from the block."""


class BlockStore:
    """The folder of one quantization, new or to be gone on with.

    Args:
        folder: is made if it is not there.
        model: the model in floating point, as it is given.
        scheme: what is done.
        batches: the calibration data.

    Raises:
        SparqError: the folder holds something else, or blocks of another model, scheme or calibration data.
    """

    def __init__(
        self, folder: Path, model: PreTrainedModel, scheme: QuantizationScheme, batches: Sequence[CalibrationBatch]
    ) -> None:
        self.folder, self.scheme = Path(folder), scheme
        attention = saved_attention(model)
        key = {
            "scheme": fingerprint(scheme.to_dict()),
            "weights": _digest(model.state_dict()),
            "attention": model.config._attn_implementation if attention is None else attention.name,
            "calibration data": _digest(
                {f"{i}.{name}": x for i, batch in enumerate(batches) for name, x in _parts(batch).items()}
            ),
        }
        if (self.folder / _KEY).is_file():
            found = read_json(self.folder / _KEY)
            for name, value in key.items():
                if not isinstance(found, dict) or found.get(name) != value:
                    raise SparqError(
                        f"{folder} holds blocks that were made from another {name}: choose another folder, or remove it"
                    )
        elif self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise SparqError(f"{folder} holds something else than an unfinished quantization: choose a new folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _KEY, key)

    def save(self, index: int, block: Rounded) -> None:
        """Keep a finished block."""
        tensors: dict[str, Tensor] = {}
        for name, (grid, integers) in block.items():
            tensors |= {f"{name}.weight": integers.contiguous(), f"{name}.weight_scale": grid.scale.contiguous()}
            if grid.zero_point is not None:
                tensors[f"{name}.weight_zero_point"] = grid.zero_point.contiguous()
        with atomic_path(self._path(index)) as temporary:
            save_file(tensors, temporary)

    def load(self, index: int, bits: Mapping[str, int]) -> Rounded | None:
        """Return a block if it is finished.

        Args:
            index: its number.
            bits: of the weights of each of its linear layers.

        Raises:
            SparqError: its file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            return {
                name: (
                    Grid(
                        scale=tensors[f"{name}.weight_scale"],
                        zero_point=tensors.get(f"{name}.weight_zero_point"),
                        bits=width,
                    ),
                    tensors[f"{name}.weight"],
                )
                for name, width in bits.items()
            }
        except (OSError, SafetensorError, KeyError) as error:
            raise SparqError(f"{path} is damaged ({error}): remove it, and the block is made again") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04}.safetensors"


def _parts(batch: CalibrationBatch) -> Mapping[str, Tensor]:
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return {"input_ids": batch}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
