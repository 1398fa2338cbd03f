"""Quantized models as files: `model.safetensors` and `quantization.json`, nothing else needed.

Integers of b bits take b bits: a row of them is one string of bits, filled up to whole bytes. Every other tensor keeps
its type.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sparq.attention import IMPLEMENTATION
from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json
from sparq.models.conversion import convert, saved_attention
from sparq.models.families import family_of, named_linears
from sparq.quantization.attention import quantize_attention
from sparq.quantization.embeddings import QuantizedEmbedding, quantized_head
from sparq.quantization.integers import runs_on_integers
from sparq.quantization.linear import QuantizedLinear, activation_settings
from sparq.quantization.packing import pack, unpack
from sparq.quantization.quantize import CONFIG_KEY, scheme_of
from sparq.quantization.rotation import replace_norms
from sparq.quantization.scheme import EMBEDDING_GROUPS, FLOAT_BITS, QuantizationScheme

TENSORS = "model.safetensors"
DESCRIPTION = "quantization.json"
FORMAT = "sparq-quantized-model"
VERSION = 2
_KEYS = {"scheme", "attention", "config", "generation", "aliases"}
_PACKED = ".weight_packed"
_BUFFERS = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "bias",
    "input_scale",
    "input_matrix",
    "low_rank_a",
    "low_rank_b",
    "activation_scale",
    "activation_zero_point",
)


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write a quantized model; an older one in that folder is replaced, whole or not at all.

    Args:
        model: a result of `quantize`.
        folder: holds this model and nothing else.

    Raises:
        SparqError: the model is not quantized, or the folder has other files in it.
    """
    scheme = scheme_of(model)
    if scheme is None:
        raise SparqError("the model is not quantized: call quantize first")
    if runs_on_integers(model):
        raise SparqError("the model computes with integers: save it before to_integers")
    folder = Path(folder)
    if folder.exists() and not (folder / DESCRIPTION).exists() and (folder.is_file() or any(folder.iterdir())):
        raise SparqError(f"{folder} holds something else than a quantized model: choose a new folder")
    tensors, aliases = _without_aliases({**model.state_dict(), **_transient_buffers(model)})
    for name, bits in _integer_layers(model, scheme):
        if bits < 8 and f"{name}.weight" in tensors:  # not so for a head that is tied to the embedding
            tensors[name + _PACKED] = pack(tensors.pop(f"{name}.weight"), bits)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "scheme": scheme.to_dict(),
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if model.generation_config is not None else None,
        "aliases": aliases,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        write_json(temporary / DESCRIPTION, description)


def is_quantized(folder: Path) -> bool:
    """Tell whether a folder holds what `save_quantized` wrote."""
    return (folder / DESCRIPTION).is_file()


def load_quantized(folder: Path, build: Callable[[PretrainedConfig], PreTrainedModel] | None = None) -> PreTrainedModel:
    """Read a model that `save_quantized` wrote; its outputs are the same, bit for bit.

    Args:
        folder: the folder that was written.
        build: makes a model, of any weights, from its config, for models that transformers alone cannot make,
            such as those with an attention from elsewhere. The default is transformers' causal LM of that
            config, with sparq's attention variants registered.

    Raises:
        SparqError: the folder is not a quantized model, a file is damaged, a tensor is missing, unknown or of
            the wrong shape, or the model has an attention that is not registered.
    """
    folder = Path(folder)
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise SparqError(f"{folder / DESCRIPTION} does not describe a quantized model")
    if description.get("version") != VERSION:
        raise SparqError(f"{folder} has format version {description.get('version')!r}; this sparq reads {VERSION}")
    if missing := _KEYS - description.keys():
        raise SparqError(f"{folder / DESCRIPTION} lacks {', '.join(sorted(missing))}: it is damaged")
    scheme = QuantizationScheme.from_dict(description["scheme"])
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise SparqError(f"cannot read {folder / TENSORS}: {error}") from error

    model = _build(description, build)
    if scheme.rotates:
        replace_norms(model)
    quantize_attention(model, scheme)
    aliases: Mapping[str, str] = description["aliases"]
    _place_linears(model, scheme, tensors, aliases, folder)
    if scheme.embedding_bits != FLOAT_BITS:
        _place_embeddings(model, scheme.embedding_bits, tensors, aliases, folder)
    try:
        state = {**tensors, **{name: tensors[target] for name, target in aliases.items()}}
        for name in _transient_buffers(model):
            _set_tensor(model, name, state.pop(name))
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        raise SparqError(f"{folder / TENSORS} does not fit the model: {' '.join(str(error).split())}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, target in aliases.items():
        if name in parameters:  # one parameter, not two that share storage
            _set_tensor(model, name, parameters[target])
    setattr(model.config, CONFIG_KEY, scheme.to_dict())
    return model.requires_grad_(False).eval()


def _integer_layers(model: PreTrainedModel, scheme: QuantizationScheme) -> list[tuple[str, int]]:
    """Return names and bits of the layers whose `weight` is integers."""
    layers = [(name, scheme.for_layer(name).weight_bits) for name, _ in named_linears(model)]
    if scheme.embedding_bits != FLOAT_BITS:
        layers += [(name, scheme.embedding_bits) for name in _embedding_names(model)]
    return layers


def _embedding_names(model: PreTrainedModel) -> tuple[str, str]:
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


def _transient_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    # Rotary frequencies are not in the state, but `model.to(torch.bfloat16)` rounds them like the rest.
    persistent = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Tied weights are one tensor with two names, which safetensors refuses to write twice.
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor
    return tensors, aliases


def _build_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    converted = config._attn_implementation == IMPLEMENTATION
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if converted else config._attn_implementation
    )
    spec = saved_attention(model)
    return convert(model, spec) if converted and spec is not None else model


def _build(
    description: Mapping[str, Any], build: Callable[[PretrainedConfig], PreTrainedModel] | None
) -> PreTrainedModel:
    attention = description["attention"]
    config = AutoConfig.for_model(**description["config"])
    config._attn_implementation = attention
    with no_init_weights():  # every weight is replaced, which the strict load below proves
        try:
            model = (build or _build_causal_lm)(config)
        except ValueError as error:
            if build is None and attention is not None and attention in str(error):
                raise SparqError(
                    f"the model has the attention {attention!r}, which is not registered: pass a `build` that does it"
                ) from error
            raise
    if model.config._attn_implementation != attention:
        raise SparqError(
            f"the model was quantized with the attention {attention!r}, "
            f"but `build` made one with {model.config._attn_implementation!r}"
        )
    if description["generation"] is not None:
        model.generation_config = GenerationConfig.from_dict(description["generation"])
    return model


def _place_linears(
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    tensors: dict[str, Tensor],
    aliases: Mapping[str, str],
    folder: Path,
) -> None:
    for name, linear in list(named_linears(model)):
        assert isinstance(linear, nn.Linear)
        _unpack_weight(tensors, name, scheme.for_layer(name).weight_bits, linear.in_features)
        # Layers that read one norm may share a matrix.
        stored = {key: aliases.get(f"{name}.{key}", f"{name}.{key}") for key in _BUFFERS}
        found: dict[str, Any] = {key: tensors[full] for key, full in stored.items() if full in tensors}
        _check_shapes(found, scheme, linear, f"{folder / TENSORS} does not fit {name}")
        layer = QuantizedLinear(
            **found,
            **activation_settings(scheme.for_layer(name)),
            hadamard=scheme.rotates and name.endswith(f".{family_of(model).down}"),
        )
        model.set_submodule(name, layer)


def _unpack_weight(tensors: dict[str, Tensor], name: str, bits: int, columns: int) -> None:
    if name + _PACKED in tensors:
        tensors[f"{name}.weight"] = unpack(tensors.pop(name + _PACKED), bits, columns)


def _place_embeddings(
    model: PreTrainedModel, bits: int, tensors: dict[str, Tensor], aliases: Mapping[str, str], folder: Path
) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: list[tuple[Tensor, Tensor]] = []
    for name, layer in zip(_embedding_names(model), (embedding, head), strict=True):
        rows, columns = layer.weight.shape
        _unpack_weight(tensors, name, bits, columns)
        shapes = {"weight": [rows, columns], "weight_scale": [rows, columns // (EMBEDDING_GROUPS[bits] or columns)]}
        stored = {key: tensors.get(aliases.get(f"{name}.{key}", f"{name}.{key}")) for key in shapes}
        for key, tensor in stored.items():
            shape = None if tensor is None else list(tensor.shape)
            if shape != shapes[key]:
                raise SparqError(f"{folder / TENSORS} does not fit {name}: {key} has shape {shape}, not {shapes[key]}")
        weight, scale = stored["weight"], stored["weight_scale"]
        assert weight is not None
        assert scale is not None
        found.append((weight, scale))
    model.set_input_embeddings(QuantizedEmbedding(*found[0], embedding.weight.dtype))
    model.set_output_embeddings(quantized_head(*found[1], head.bias))


def _check_shapes(found: Mapping[str, Tensor], scheme: QuantizationScheme, linear: nn.Linear, complaint: str) -> None:
    rows, columns = linear.weight.shape
    shapes: dict[str, list[int]] = {"weight": [rows, columns]}
    if scheme.weight_bits != FLOAT_BITS:
        shapes["weight_scale"] = [rows, columns // (scheme.group_size or columns)]
        if not scheme.weight_symmetric:
            shapes["weight_zero_point"] = shapes["weight_scale"]
    # A rotated LayerNorm leaves its bias, and a learned shift its own, to layers that may have had none.
    has_bias: bool = linear.bias is not None
    if has_bias or ((scheme.rotates or scheme.method == "omniquant") and "bias" in found):
        shapes["bias"] = [rows]
    if scheme.fixes_ranges:
        shapes["activation_scale"] = [1]
        if not scheme.activation_symmetric:
            shapes["activation_zero_point"] = [1]
    if scheme.low_rank is not None:
        shapes |= {"low_rank_a": [scheme.low_rank, columns], "low_rank_b": [rows, scheme.low_rank]}
    if "input_scale" in found:
        shapes["input_scale"] = [columns]
    if "input_matrix" in found:
        shapes["input_matrix"] = [columns, columns]
    for key in shapes.keys() | found.keys():
        shape = list(found[key].shape) if key in found else None
        if shape != shapes.get(key):
            raise SparqError(f"{complaint}: {key} has shape {shape}, not {shapes.get(key)}")


def _set_tensor(model: PreTrainedModel, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
