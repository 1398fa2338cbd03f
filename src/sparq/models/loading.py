"""Loading pretrained causal LMs with every tensor accounted for."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparq.errors import SparqError
from sparq.files import sha256_file
from sparq.models.attention import set_attention
from sparq.pretrained.quiet import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class LoadedBackbone:
    """A pretrained model and the account of its loading.

    Attributes:
        model: the causal LM, in evaluation mode.
        num_tensors: how many tensors of the model were filled from the checkpoint: all of them.
        num_parameters: how many numbers these hold, a tied tensor counted once.
        checksum: SHA-256 over the weights' files (folders) or the tensors' bytes (hub names).
    """

    model: PreTrainedModel
    num_tensors: int
    num_parameters: int
    checksum: str


def load_backbone(reference: str, *, attention: str = "vanilla", dtype: torch.dtype = torch.float32) -> LoadedBackbone:
    """Load a pretrained causal LM from a folder or a hub name and give it an attention variant.

    Args:
        reference: a folder with `config.json` and safetensors weights, or a hub name.
        attention: the variant to run it with.
        dtype: the dtype of its parameters.

    Raises:
        SparqError: there is nothing to load, the family is not supported, or a tensor is missing, unused or of another
            shape than the config says.
    """
    try:
        with quiet_transformers():
            model, account = AutoModelForCausalLM.from_pretrained(
                reference, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SparqError(
            f"cannot load a causal LM from {reference!r}: {reason}"
            " (needed: a folder with config.json and safetensors weights, or a hub name that can be reached)"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in account[kind]):
            raise SparqError(
                f"{reference}: {len(keys)} {kind.replace('_keys', '')} tensors, the first {keys[0]!r}: the checkpoint"
                " does not fit its config.json, and a partly loaded model is refused"
            )
    set_attention(model, attention)
    parameters = list(model.parameters())
    return LoadedBackbone(
        model=model.eval(),
        num_tensors=len(parameters),
        num_parameters=sum(p.numel() for p in parameters),
        checksum=weights_checksum(reference, model),
    )


def weights_checksum(reference: str, model: PreTrainedModel) -> str:
    """Return a SHA-256 that names the weights: of the files of a folder, else of the tensors themselves."""
    files = sorted(Path(reference).glob("*.safetensors")) if Path(reference).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    if not files:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
