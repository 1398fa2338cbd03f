"""Strict loading of the lower part of a pretrained speech encoder, through transformers."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoFeatureExtractor

from sparq.errors import SparqError
from sparq.pretrained.quiet import quiet_transformers

_FAULTS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def read_config(model: str) -> Any:
    """Return the transformers config of a folder or hub name.

    Raises:
        SparqError: there is no such folder or hub model.
    """
    looks_local = model.startswith((".", "/", "~")) or Path(model).exists()
    if looks_local and not (Path(model).expanduser() / "config.json").is_file():
        raise SparqError(f"no model at {model!r}: expected a Hugging Face folder with a config.json")
    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(_reference(model))
        except _FAULTS as error:
            raise SparqError(f"cannot read the config of model {model!r}: {_first_line(error)}") from error


def read_preprocessor(model: str) -> Any:
    """Return the transformers feature extractor of a folder or hub name (its preprocessor_config.json).

    Raises:
        SparqError: it is missing or broken.
    """
    with quiet_transformers():
        try:
            return AutoFeatureExtractor.from_pretrained(_reference(model))
        except _FAULTS as error:
            raise SparqError(f"cannot read preprocessor_config.json of {model!r}: {_first_line(error)}") from error


def load_lower_part(
    model_class: Any, model: str, config: Any, *, used: str, key_mapping: Mapping[str, str] | None = None
) -> Any:
    """Load a model with a shortened layer stack in float32, from safetensors only.

    Args:
        model_class: the transformers class.
        model: folder or hub name.
        config: its config with fewer layers.
        used: regular expression of the tensor names that belong to the part in use. A tensor of the file that
            matches and that the class does not know is an error; others (upper layers, heads, a decoder) are
            not.
        key_mapping: renames from names in the file to names in the class.

    Raises:
        SparqError: no safetensors weights, or tensors of the part in use are missing, unknown or misshapen.
    """
    with quiet_transformers():
        try:
            loaded, info = model_class.from_pretrained(
                _reference(model),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                key_mapping=dict(key_mapping or {}),
            )
        except _FAULTS as error:
            raise SparqError(f"cannot load the weights of {model!r}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    unknown = sorted(key for key in info["unexpected_keys"] if re.match(used, key))
    for fault, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise SparqError(
                f"model {model!r} {fault} {len(names)} tensors of a {config.model_type} encoder, e.g. {names[0]!r}"
            )
    return loaded.eval().requires_grad_(False)


def hash_tensors(module: torch.nn.Module) -> str:
    """Return the SHA-256 over names, shapes and float32 values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_layer(layer: int, num_layers: int, model: str) -> None:
    """Raise a SparqError unless the model has this layer."""
    if not 1 <= layer <= num_layers:
        raise SparqError(f"layer {layer} of {model!r} does not exist: valid are 1 to {num_layers}")


def _reference(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
