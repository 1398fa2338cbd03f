"""The finished parts of an unfinished quantization, in a folder, so that an interrupted one goes on.

A block is a file, `block-0007.safetensors`: the integers, scales and zero points of its linear layers, or what it has
learned. `training.safetensors` is the state of a training of the whole model. `resume.json` has fingerprints of what
they were made from. Files are whole or absent.
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
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.scheme import QuantizationScheme

_KEY = "resume.json"


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
        self.folder, self.scheme, self.device = Path(folder), scheme, model.device
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

    def save(self, index: int, block: Mapping[str, Tensor]) -> None:
        """Keep what a finished block is made from."""
        self._write(f"block-{index:04}", block)

    def load(self, index: int) -> dict[str, Tensor] | None:
        """Return what was kept of a block, or None if it is not finished.

        Raises:
            SparqError: its file is damaged.
        """
        return self._read(f"block-{index:04}")

    def save_training(self, state: Mapping[str, Tensor]) -> None:
        """Keep the state of a training of the whole model, in place of an earlier one."""
        self._write("training", state)

    def load_training(self) -> dict[str, Tensor] | None:
        """Return the state of the training of the whole model, or None if there is none yet.

        Raises:
            SparqError: its file is damaged.
        """
        return self._read("training")

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)

    def _read(self, name: str) -> dict[str, Tensor] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SparqError(f"{path} is damaged ({error}): remove it, and what it held is made again") from error
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}


def _parts(batch: CalibrationBatch) -> Mapping[str, Tensor]:
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    return {"input_ids": batch}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
