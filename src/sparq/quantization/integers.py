"""From a quantized model that is simulated to one that computes with its integers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models.families import decoder_blocks, family_of, named_linears
from sparq.quantization.embeddings import QuantizedEmbedding
from sparq.quantization.integer_linear import IntegerLinear
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.products import GPU_MULTIPLE, require_exact_products
from sparq.quantization.quantize import scheme_of
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme
from sparq.quantization.shared import SharedLinear, SharedProduct
from sparq.quantization.weight_only import (
    KERNEL_GROUPS,
    KERNEL_INPUTS,
    KERNEL_OUTPUTS,
    WeightOnly4,
    WeightOnly8,
    kernel_group,
    require_weight_only,
)

HALF_BYTE_BITS = 4
"""The most bits of weights that are kept two a byte."""

_EXECUTING = (IntegerLinear, SharedLinear, WeightOnly4, WeightOnly8)


@torch.no_grad()
def to_integers(model: PreTrainedModel) -> PreTrainedModel:
    """Make a quantized model compute with its integers, in place: faster and smaller, for inference.

    What each layer becomes follows from the model's scheme:

    - weights of 2 to 8 bits, activations of 2 to 8 bits: `IntegerLinear`, exact products of int8 in int32. Weights of
      at most 4 bits take half a byte. Layers that read the output of one norm (q, k, v; gate, up) become one product.
    - weights of 5 to 8 bits, activations of 16: `WeightOnly8`, and with weights of 2 to 4 bits `WeightOnly4`: kernels
      that multiply in bfloat16, so the model must be in bfloat16.
    - embedding and head of 4 to 8 bits: integers in memory, and the head as with activations of 16 bits.

    No copy of the weights in floating point stays. The result cannot be saved: save the quantized model before. Nor can
    it be moved: to compute on a GPU, move the quantized model there first.

    Args:
        model: a result of `quantize` or `load_quantized`.

    Returns:
        The same model.

    Raises:
        SparqError: the model is not quantized, runs on integers already, has weights of 16 bits, the device has no
            kernels or its int8 products are not exact, or a layer does not fit a kernel; the message says what would.
            The model is then as it was.
    """
    scheme = scheme_of(model)
    if scheme is None:
        raise SparqError("the model is not quantized: call quantize first")
    if runs_on_integers(model):
        raise SparqError("the model computes with integers already")
    if scheme.weight_bits == FLOAT_BITS:
        raise SparqError("weight_bits is 16, so there are no integers to compute with: quantize to 2 to 8 bits")
    if scheme.activation_bits != FLOAT_BITS:
        require_exact_products(
            max(scheme.for_layer(name).weight_bits for name, _ in named_linears(model)), model.device
        )
    layers = dict(named_linears(model))
    if scheme.embedding_bits != FLOAT_BITS:
        layers["the head"] = model.get_output_embeddings()
    kinds: set[bool] = set()
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedLinear), f"{name} is not quantized"
        bits = scheme.embedding_bits if name == "the head" else scheme.for_layer(name).weight_bits
        _check(name, layer, bits, model.dtype)
        if layer.activation_bits == FLOAT_BITS:
            kinds.add(bits <= HALF_BYTE_BITS)
    for halves in kinds:
        require_weight_only(model.device, halves=halves)
    _replace_linears(model, scheme)
    if scheme.embedding_bits != FLOAT_BITS:
        _replace_embeddings(model, scheme.embedding_bits)
    elif model.device.type == "cpu":
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model


def runs_on_integers(model: nn.Module) -> bool:
    """Tell whether a model is a result of `to_integers`."""
    return any(isinstance(module, _EXECUTING) for module in model.modules())


def _check(name: str, layer: QuantizedLinear, bits: int, dtype: torch.dtype) -> None:
    assert layer.weight_scale is not None
    if layer.low_rank_a is not None:
        raise SparqError(f"{name} has a low_rank part, which has no integers: quantize with low_rank null")
    inputs, outputs, groups = layer.in_features, layer.out_features, layer.weight_scale.shape[1]
    halves = bits <= HALF_BYTE_BITS
    if layer.activation_bits != FLOAT_BITS:
        if inputs == groups:
            raise SparqError(f"{name} has a scale for every weight: group_size must be at least 2")
        if halves and (inputs % 2 or inputs < 4):
            raise SparqError(f"{name} has {inputs} inputs: 4-bit weights need an even number from 4 on")
        sizes = (inputs // groups, inputs // (2 if halves else 1), outputs)
        if layer.weight.device.type != "cpu" and any(size % GPU_MULTIPLE for size in sizes):
            raise SparqError(
                f"{name} has {inputs} inputs in {groups} groups and {outputs} outputs: on a GPU a group, half of 4-bit"
                f" weights' inputs and the outputs need to be multiples of {GPU_MULTIPLE}; model.to('cpu') first"
            )
        return
    if dtype != torch.bfloat16:
        raise SparqError(
            f"{name} has activations of 16 bits, which are computed in bfloat16, but the model is in"
            f" {str(dtype).removeprefix('torch.')}: model.to(torch.bfloat16) first, or quantize them to 8 bits"
        )
    if halves:
        if kernel_group(inputs, groups) is None:
            raise SparqError(
                f"{name} has groups of {inputs // groups}: without quantized activations, 4-bit weights need a multiple"
                f" of {min(KERNEL_GROUPS)}"
            )
        if outputs % KERNEL_OUTPUTS:
            raise SparqError(
                f"{name} has {outputs} outputs: without quantized activations, 4-bit weights need a multiple of"
                f" {KERNEL_OUTPUTS}, 8-bit weights none"
            )
        return
    if groups > 1 or layer.weight_zero_point is not None:
        raise SparqError(
            f"{name} has groups or zero points: without quantized activations, 8-bit weights need group_size null and"
            " weight_symmetric true"
        )
    if inputs % KERNEL_INPUTS:
        raise SparqError(
            f"{name} has {inputs} inputs: without quantized activations, 8-bit weights need a multiple of"
            f" {KERNEL_INPUTS}"
        )


def _replace_linears(model: PreTrainedModel, scheme: QuantizationScheme) -> None:
    family = family_of(model)
    groups = [group.linears for group in family.norm_groups if len(group.linears) > 1]
    for index, block in enumerate(decoder_blocks(model)):
        halves = {
            name: scheme.for_layer(f"{family.blocks}.{index}.{name}").weight_bits <= HALF_BYTE_BITS
            for name in family.linears
        }
        if scheme.activation_bits == FLOAT_BITS:
            for name in family.linears:
                block.set_submodule(name, _weight_only(block.get_submodule(name), halves=halves[name]))
            continue
        for names in [*groups, *((name,) for name in family.linears)]:
            layers = [block.get_submodule(name) for name in names]
            plain = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
            # Those of a group are done when their turn to go alone comes.
            if len(plain) < len(layers) or len({halves[name] for name in names}) > 1 or not _alike(plain):
                continue
            linear = IntegerLinear(plain, halves=halves[names[0]])
            product = SharedProduct([layer.out_features for layer in plain])
            for number, name in enumerate(names):
                block.set_submodule(name, SharedLinear(linear, product, number) if len(names) > 1 else linear)


def _replace_embeddings(model: PreTrainedModel, bits: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    halves = bits <= HALF_BYTE_BITS
    if halves:
        model.set_input_embeddings(embedding.packed())
    model.set_output_embeddings(_weight_only(head, halves=halves))


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # The last token's state is a slice, and PyTorch multiplies that by a frozen bfloat16 head 70 times slower. A single
    # slice counts as contiguous whatever its strides are, so only a copy has those of a row.
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def _weight_only(layer: nn.Module, *, halves: bool) -> nn.Module:
    assert isinstance(layer, QuantizedLinear)
    make: Callable[[QuantizedLinear], nn.Module] = WeightOnly4 if halves else WeightOnly8
    return make(layer)


def _alike(layers: list[QuantizedLinear]) -> bool:
    """Tell whether layers treat their input alike, have as many groups, and have a bias or none."""
    bare = [layer.without_outputs() for layer in layers]
    settings = [{k: v for k, v in vars(layer).items() if isinstance(v, bool | int | float | str)} for layer in bare]
    first, *others = [layer.state_dict() for layer in bare]
    return all(own == settings[0] for own in settings) and all(
        state.keys() == first.keys() and all(torch.equal(state[key], first[key]) for key in first) for state in others
    )
