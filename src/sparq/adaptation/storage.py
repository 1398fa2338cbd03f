"""A trained SpeechLM as a folder that holds all it needs but the backbone.

```
speechlm.json            what it is: backbone and its checksum, attention, vocabulary and units it belongs to
adapter/                 PEFT's own format, for the backbone as it is (lora) or rounded to `base` (qlora)
base.safetensors         what was taken out of the backbone ahead of rounding; nothing but for LoftQ (qlora)
attention.safetensors    sinks and gates of an attention that brings them (lora, qlora)
vocabulary.safetensors   embedding, head unless tied, projections (lora, qlora)
model.safetensors        every weight (full)
vocabulary/              the joint vocabulary
kmeans.safetensors       the units
```
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparq.adaptation.initialization import ADAPTER, absorb_removed, adapted_layers, removed_parts
from sparq.adaptation.lora import quiet_peft, vocabulary_modules
from sparq.adaptation.quantized_base import LowRank, round_base
from sparq.adaptation.settings import Base
from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json
from sparq.models.conversion import attention_parameters
from sparq.models.loading import load_backbone
from sparq.models.speechlm import replace_vocabulary
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers
from sparq.tokens import JointVocabulary

FORMAT = 1
DESCRIPTION_FILE = "speechlm.json"
BASE_FILE = "base.safetensors"
ATTENTION_FILE = "attention.safetensors"


@dataclass(frozen=True, kw_only=True)
class SpeechLMDescription:
    """What a model folder says about itself; `base` is what a frozen backbone was kept in (qlora)."""

    backbone: str
    backbone_checksum: str
    attention: str
    method: Literal["full", "lora", "qlora"]
    vocabulary_fingerprint: str
    units_fingerprint: str
    training: dict[str, Any]
    base: Base | None = None
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class SpeechLM:
    """A model ready to use, with the vocabulary and the k-means file that it was trained with."""

    model: PreTrainedModel
    vocabulary: JointVocabulary
    description: SpeechLMDescription
    folder: Path

    @property
    def kmeans_file(self) -> Path:
        """The centroids of its units."""
        return self.folder / "kmeans.safetensors"


def save_speechlm(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    *,
    vocabulary: JointVocabulary,
    kmeans_file: Path,
    description: SpeechLMDescription,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: where to.
        model: PEFT-wrapped for methods lora and qlora, plain for method full.
        vocabulary: the joint vocabulary.
        kmeans_file: centroids of the units.
        description: becomes `speechlm.json`.
        dtype: of the stored weights; None keeps them as they are.
    """

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype).contiguous().clone()

    with atomic_path(folder) as temporary:
        temporary.mkdir()
        vocabulary.save(temporary / "vocabulary")
        shutil.copyfile(kmeans_file, temporary / "kmeans.safetensors")
        if isinstance(model, PeftModel):
            _save_adapter(temporary, model, description, stored)
            tensors = {
                f"{name}.{key}": stored(tensor)
                for name, module in vocabulary_modules(model.get_base_model()).items()
                for key, tensor in module.state_dict().items()
            }
            save_file(tensors, temporary / "vocabulary.safetensors", metadata={"format": "pt"})
            if own := attention_parameters(model.get_base_model()):
                # As exact as they are: they are few, and a sink is a logit.
                tensors = {name: tensor.detach().contiguous() for name, tensor in own.items()}
                save_file(tensors, temporary / ATTENTION_FILE, metadata={"format": "pt"})
        else:
            tied = {} if model.get_output_embeddings() is None else _tied_names(model)
            tensors = {k: stored(v) for k, v in model.state_dict().items() if k not in tied}
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / DESCRIPTION_FILE, asdict(description))


def _save_adapter(
    folder: Path, model: PeftModel, description: SpeechLMDescription, stored: Callable[[Tensor], Tensor]
) -> None:
    """Write the adapters, and what their base lacks: into the adapters, or beside them where the base was rounded."""
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    # PEFT's model card holds nothing but a template, and its config the machine's path of the backbone.
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter" / "adapter_config.json")
    config["base_model_name_or_path"] = description.backbone
    # Where training started from is over; PEFT would take it out of the base again.
    config.update(init_lora_weights=True, eva_config=None)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors, removed = load_file(file), removed_parts(model)
    if removed and description.base is None:
        scaling = next(layer.scaling[ADAPTER] for _, layer in adapted_layers(model))
        # Not cast to what else is stored in: most of either half is in the other one too.
        tensors = absorb_removed(tensors, removed, scaling)
        # Twice the rank; alpha keeps s, which is alpha / rank or alpha / sqrt(rank).
        config["r"] *= 2
        config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    else:
        tensors = {k: stored(v) for k, v in tensors.items()}
    if description.base is not None:
        parts = {f"{name}.{key}": value for name, part in removed.items() for key, value in part._asdict().items()}
        save_file({k: v.contiguous() for k, v in parts.items()}, folder / BASE_FILE, metadata={"format": "pt"})
    save_file(tensors, file, metadata={"format": "pt"})
    write_json(folder / "adapter" / "adapter_config.json", config)


def _tied_names(model: PreTrainedModel) -> set[str]:
    parameters = {name for name, _ in model.named_parameters()}
    return {name for name in model.state_dict(keep_vars=True) if name not in parameters} - {
        name for name, _ in model.named_buffers()
    }


def read_description(folder: Path) -> SpeechLMDescription:
    """Read `speechlm.json`.

    Raises:
        SparqError: the folder is no SpeechLM or of another format.
    """
    path = folder / DESCRIPTION_FILE
    if not path.exists():
        raise SparqError(f"{folder} is not a SpeechLM folder: it has no {DESCRIPTION_FILE}")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SparqError(f"{path} is not a SpeechLM description of format {FORMAT}")
    try:
        return SpeechLMDescription(**content)
    except TypeError as error:
        raise SparqError(f"{path} does not describe a SpeechLM: {error}") from error


def load_speechlm(folder: Path, *, dtype: torch.dtype = torch.float32) -> SpeechLM:
    """Load a model folder onto a fresh backbone, adapters merged in float32 and then cast.

    Method qlora's adapters are merged into the weights that its rounded base stands for, which is what was trained;
    they do not make up for another base, be it a better one.

    Raises:
        SparqError: something is missing, does not belong together, or the backbone is not the one it was trained on;
            bitsandbytes is not installed (qlora).
    """
    folder = Path(folder)
    description = read_description(folder)
    vocabulary = JointVocabulary.load(folder / "vocabulary", units_fingerprint=description.units_fingerprint)
    if vocabulary.fingerprint != description.vocabulary_fingerprint:
        raise SparqError(
            f"{folder} was trained with vocabulary {description.vocabulary_fingerprint}, but holds"
            f" {vocabulary.fingerprint}: restore the vocabulary folder that it was trained with"
        )
    loaded = load_backbone(resolve_model(description.backbone), attention=description.attention)
    if loaded.checksum != description.backbone_checksum:
        raise SparqError(
            f"{folder} was trained on weights {description.backbone_checksum[:16]}, but {description.backbone!r} holds"
            f" {loaded.checksum[:16]}: use the backbone that it was trained on"
        )
    model = loaded.model
    adapters = description.method != "full"
    file = folder / ("vocabulary.safetensors" if adapters else "model.safetensors")
    tensors = _read_tensors(file)
    embedding_key = "embedding.weight" if adapters else _embedding_name(model)
    if embedding_key not in tensors:
        raise SparqError(f"{file} has no tensor {embedding_key!r}: it is not of this backbone")
    replace_vocabulary(model, vocabulary, tensors[embedding_key].float())
    if adapters:
        for name, module in vocabulary_modules(model).items():
            own = {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}
            _load_strict(module, own, f"{file} ({name})")
        _load_attention(model, folder / ATTENTION_FILE)
        if description.base is not None:
            round_base(model, description.base, _read_removed(folder / BASE_FILE))
        with quiet_transformers(), quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(folder / "adapter"), autocast_adapter_dtype=True)
            _check_adapter(adapted, folder / "adapter" / "adapter_model.safetensors")
            model = adapted.merge_and_unload()
    else:
        tied = {name: model.get_input_embeddings().weight for name in _tied_names(model)}
        _load_strict(model, {k: v.float() for k, v in tensors.items()} | tied, str(file))
    return SpeechLM(model=model.to(dtype).eval(), vocabulary=vocabulary, description=description, folder=folder)


def _embedding_name(model: PreTrainedModel) -> str:
    weight = model.get_input_embeddings().weight
    return next(str(name) for name, parameter in model.named_parameters() if parameter is weight)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise SparqError(f"no such file: {file}")
    try:
        return dict(load_file(file))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise SparqError(f"{file} is not a whole safetensors file: {error}") from error


def _read_removed(file: Path) -> dict[str, LowRank]:
    tensors = _read_tensors(file)
    names = {key.rpartition(".")[0] for key in tensors}
    return {name: LowRank(a=tensors[f"{name}.a"], b=tensors[f"{name}.b"]) for name in names}


@torch.no_grad()
def _load_attention(model: PreTrainedModel, file: Path) -> None:
    parameters = attention_parameters(model)
    tensors = _read_tensors(file) if parameters or file.exists() else {}
    if differing := sorted(tensors.keys() ^ parameters.keys()):
        raise SparqError(f"{file} does not fit the attention: {len(differing)} tensors, the first {differing[0]!r}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise SparqError(
                f"{file} does not fit the attention: {name!r} has shape {tuple(tensors[name].shape)}, expected"
                f" {tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


def _load_strict(module: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise SparqError(f"{where} does not fit the model: {detail[:300]}") from error


def _check_adapter(adapted: PeftModel, file: Path) -> None:
    """PEFT loads what it finds and is content: count that every adapter tensor of the file is in the model."""
    stored = _read_tensors(file)
    # PEFT keeps DoRA's lengths in a layer of their own, but not so in files.
    state = {
        k.replace(".default.", ".").replace("magnitude_vector.weight", "magnitude_vector"): v
        for k, v in adapted.state_dict().items()
        if "lora_" in k
    }
    if missing := sorted(stored.keys() ^ state.keys()):
        raise SparqError(f"{file}: {len(missing)} adapter tensors do not fit the model, the first {missing[0]!r}")
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), f"PEFT did not load {name}"
