"""Loading pretrained causal LMs with every tensor accounted for."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from sparq.attention import CHILD, AttentionSpec, OutlierFreeAttention
from sparq.errors import SparqError
from sparq.files import sha256_file
from sparq.models.conversion import convert, saved_attention
from sparq.pretrained import resolve_model
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


def load_model(
    reference: str,
    attention: str | AttentionSpec | None = None,
    *,
    replace: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a causal LM from a folder, a hub name or `pretrained:NAME`; the arguments are those of `load_backbone`."""
    return load_backbone(resolve_model(reference), attention=attention, replace=replace, dtype=dtype).model


def load_backbone(
    reference: str,
    *,
    attention: str | AttentionSpec | None = None,
    replace: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoadedBackbone:
    """Load a pretrained causal LM from a folder or a hub name and give it an attention variant.

    Args:
        reference: a folder with `config.json` and safetensors weights, or a hub name.
        attention: the variant to run it with; None is the one that its config names, or `vanilla`.
        replace: allow another variant than the one that its config names.
        dtype: the dtype of its parameters.

    Raises:
        SparqError: there is nothing to load, the family or the variant is not supported, the config names another
            variant, or a tensor is missing, unused or of another shape than the config says.
    """
    reference = str(reference)
    try:
        with quiet_transformers():
            model, account = AutoModelForCausalLM.from_pretrained(
                reference, dtype=dtype, use_safetensors=True, output_loading_info=True, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SparqError(
            f"cannot load a causal LM from {reference!r}: {reason}"
            " (needed: a folder with config.json and safetensors weights, or a hub name that can be reached)"
        ) from error
    own = {str(key) for key in account["unexpected_keys"] if f".{CHILD}." in str(key)}
    account = {**account, "unexpected_keys": set(account["unexpected_keys"]) - own}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in account[kind]):
            raise SparqError(
                f"{reference}: {len(keys)} {kind.replace('_keys', '')} tensors, the first {keys[0]!r}: the checkpoint"
                " does not fit its config.json, and a partly loaded model is refused"
            )
    parameters = list(model.parameters())
    saved = saved_attention(model)
    spec = AttentionSpec.parse(attention) if attention is not None else saved or AttentionSpec()
    convert(model, spec, replace=replace)
    if saved == spec:
        _load_own_tensors(model, own, reference)
    return LoadedBackbone(
        model=model.eval(),
        num_tensors=len(parameters),
        num_parameters=sum(p.numel() for p in parameters),
        checksum=weights_checksum(reference, model),
    )


def _load_own_tensors(model: PreTrainedModel, found: set[str], reference: str) -> None:
    """Fill what a variant brings: transformers does not know these tensors, so it left them unused."""
    for name, layer in model.named_modules():
        # A model saved in the middle of a SinkSchedule has a tensor that a fresh one has not.
        if isinstance(layer, OutlierFreeAttention) and f"{name}.log_weight" in found:
            layer.log_weight = torch.zeros(layer.heads)
    expected = {name for name in model.state_dict() if f".{CHILD}." in name}
    if found != expected:
        name = sorted(found ^ expected)[0]
        raise SparqError(
            f"{reference}: {name!r} is {'missing' if name in expected else 'unexpected'}: the attention that"
            f" config.json names has {len(expected)} tensors of its own, the checkpoint {len(found)}"
        )
    if not expected:
        return
    # The folder itself, or the snapshot of a hub's repository, where the weights lie beside the config.
    folder = Path(cached_file(reference, "config.json")).parent
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys() if name in expected})  # noqa: SIM118
    model.load_state_dict(tensors, strict=False)


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
