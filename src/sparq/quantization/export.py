"""Quantized models in the format compressed-tensors, which transformers and vLLM load without sparq."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparq.attention import AttentionSpec
from sparq.errors import SparqError
from sparq.files import atomic_path, write_json
from sparq.models.conversion import CONFIG_KEY as ATTENTION_KEY
from sparq.models.conversion import saved_attention
from sparq.models.families import named_linears
from sparq.quantization.integers import runs_on_integers
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.quantize import CONFIG_KEY, scheme_of
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme

_OWN_PARTS = ("weight", "weight_scale", "weight_zero_point", "bias")


def export_compressed_tensors(model: PreTrainedModel, folder: Path) -> None:
    """Write a quantized model as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Weights of 8 bits with quantized activations become `int-quantized`, all others `pack-quantized`. The integers and
    their float32 scales are the model's own, so dequantized weights are equal bit for bit in float32. Activations are
    quantized by the reader: asymmetric ones as here; symmetric ones with the scale max|x| / 127.5, not max|x| / 127.

    Args:
        model: a result of `quantize` or `load_quantized`.
        folder: is made; it must not exist.

    Raises:
        SparqError: compressed-tensors is not installed, or the model has something that the format or transformers
            cannot represent: an attention other than the pretrained softmax, a transformed or clipped input, symmetric
            activations of fewer than 8 bits, packed weights with zero points, a quantized embedding, weights that are
            not quantized, added biases.
    """
    scheme = _checked(model)
    folder = Path(folder)
    if folder.exists():
        raise SparqError(f"{folder} exists: choose a folder that does not, nothing is overwritten")
    packed = scheme.weight_bits != 8 or scheme.activation_bits == FLOAT_BITS
    if packed and not scheme.weight_symmetric:
        raise SparqError(
            "transformers does not load packed zero points: quantize with weight_symmetric true, or to weight_bits 8"
            " with quantized activations"
        )
    layers = {name: layer for name, layer in named_linears(model) if isinstance(layer, QuantizedLinear)}
    inner = {f"{name}.{part}" for name in layers for part in _OWN_PARTS}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in inner}
    if tied:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        del tensors[f"{head}.weight"]
    for name, layer in layers.items():
        _check_layer(name, layer)
        tensors.update({f"{name}.{key}": value for key, value in _layer_tensors(layer, scheme, packed=packed).items()})
    _check_names(model, layers)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = model.config.to_dict()
    for key in (CONFIG_KEY, ATTENTION_KEY):
        config.pop(key, None)
    config["tie_word_embeddings"] = tied
    config["quantization_config"] = _description(scheme, left, packed=packed)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        metadata = {"format": "pt"}
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary / "model.safetensors", metadata)
        write_json(temporary / "config.json", config)
        if model.generation_config is not None:
            write_json(temporary / "generation_config.json", model.generation_config.to_dict())


def _checked(model: PreTrainedModel) -> QuantizationScheme:
    scheme = scheme_of(model)
    if scheme is None:
        raise SparqError("the model is not quantized: call quantize first")
    if runs_on_integers(model):
        raise SparqError("the model computes with integers: export it before to_integers")
    attention = saved_attention(model)
    if attention not in (None, AttentionSpec()):
        assert attention is not None
        raise SparqError(
            f"the model's attention is {attention.name!r}, and transformers would load it with the plain softmax, which"
            " is another function: only 'vanilla' can be exported"
        )
    if scheme.weight_bits == FLOAT_BITS:
        raise SparqError("weight_bits is 16: there are no integers to export")
    if scheme.layers:
        raise SparqError("layers of different bits are not exported: quantize with layers empty")
    if scheme.quantizes_attention:
        raise SparqError(
            "the model's attention is quantized inside, which the reader would not do: export needs 16 bits"
        )
    if scheme.activation_static or scheme.activation_granularity == "group":
        raise SparqError("export needs ranges of activations at run time, of tokens or tensors")
    if scheme.embedding_bits != FLOAT_BITS:
        raise SparqError(f"embedding_bits is {scheme.embedding_bits}: export needs 16")
    if scheme.activation_symmetric and scheme.activation_bits < 8:
        raise SparqError(
            f"symmetric activations of {scheme.activation_bits} bits have another step in compressed-tensors, by"
            f" {100 / (2**scheme.activation_bits - 1):.1f} %: quantize with activation_symmetric false, or to 8 or 16"
            " bits"
        )
    return scheme


def _check_layer(name: str, layer: QuantizedLinear) -> None:
    transforms = {
        "a division by input_scale": layer.input_scale is not None,
        "a matrix": layer.input_matrix is not None,
        "a Hadamard transform": layer.hadamard,
        "clipping": layer.activation_clip != 1 and layer.activation_bits != FLOAT_BITS,
    }
    if layer.low_rank_a is not None:
        raise SparqError(f"{name} has a low_rank part, which compressed-tensors does not represent")
    for transform, present in transforms.items():
        if present:
            raise SparqError(f"the input of {name} has {transform}, which compressed-tensors does not represent")


def _check_names(model: PreTrainedModel, layers: dict[str, QuantizedLinear]) -> None:
    """Check that transformers' model of this config has the same weights, for it would drop or invent others."""
    config = AutoConfig.for_model(**model.config.to_dict())
    with torch.device("meta"):
        plain = set(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").state_dict())
    quantized = {f"{name}.{part}" for name in layers for part in _OWN_PARTS}
    own = {name for name in model.state_dict() if name not in quantized}
    own |= {f"{name}.weight" for name in layers}
    own |= {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None}
    if own != plain:
        name = sorted(own ^ plain)[0]
        raise SparqError(f"{name} is {'not ' if name in own else ''}in transformers' model of this config")


def _layer_tensors(layer: QuantizedLinear, scheme: QuantizationScheme, *, packed: bool) -> dict[str, Tensor]:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise SparqError("export needs the package compressed-tensors: pip install 'sparq[export]'") from error
    assert layer.weight_scale is not None
    tensors = {"weight_scale": layer.weight_scale}
    if packed:
        tensors["weight_packed"] = pack_to_int32(layer.weight, scheme.weight_bits)
        tensors["weight_shape"] = torch.tensor(layer.weight.shape)
    else:
        tensors["weight"] = layer.weight
    if layer.weight_zero_point is not None:
        tensors["weight_zero_point"] = layer.weight_zero_point
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def _description(scheme: QuantizationScheme, ignore: list[str], *, packed: bool) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.weight_symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": scheme.activation_symmetric,
        "strategy": scheme.activation_granularity,
        "dynamic": True,
    }
    layout = "pack-quantized" if packed else "int-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if scheme.activation_bits == FLOAT_BITS else activations,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
