"""Rounding with error compensation, block by block, on the inputs that the quantized model really has."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models.families import decoder_blocks, family_of, input_groups
from sparq.progress import progress
from sparq.quantization.block_stream import BlockStream
from sparq.quantization.gptq import gptq_round
from sparq.quantization.grid import Grid
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.resume import BlockStore
from sparq.quantization.scheme import QuantizationScheme


@torch.no_grad()
def round_with_compensation(
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    batches: Iterable[CalibrationBatch],
    store: BlockStore | None = None,
) -> None:
    """Round the floating weights of a model's `QuantizedLinear` layers by GPTQ, in place.

    The hessian of a layer is that of its inputs as its product sees them: transformed, and quantized if activations
    are. They come from a model whose earlier blocks, and earlier layers of the same block, are quantized already. The
    bar shows the mean squared error of the block's output that its weights' rounding made.

    Args:
        model: all linear layers of its blocks are `QuantizedLinear.floating`.
        scheme: the grid and the damping.
        batches: calibration data, read once.
        store: where finished blocks are kept; those that it has are not made again.

    Raises:
        SparqError: as `BlockStream`, or inputs are NaN or infinite.
    """
    stream = BlockStream(model, batches)
    blocks, groups = family_of(model).blocks, input_groups(model)
    with progress(f"quantize {scheme.name}", total=len(stream.blocks), unit="block") as bar:
        for index, block in enumerate(decoder_blocks(model)):
            before = stream.call(index, 0)
            own = {name: scheme.for_layer(f"{blocks}.{index}.{name}") for group in groups for name in group}
            kept = None if store is None else store.load(index)
            if kept is None:
                _round_block(stream, index, groups, own)
                if store is not None:
                    store.save(index, {key: tensor for name in own for key, tensor in _rounding(block, name).items()})
            else:
                for name, each in own.items():
                    grid = Grid(
                        scale=kept[f"{name}.weight_scale"],
                        zero_point=kept.get(f"{name}.weight_zero_point"),
                        bits=each.weight_bits,
                    )
                    block.set_submodule(name, _layer(block, name).rounded(grid, kept[f"{name}.weight"]))
            loss = (stream.call(index, 0) - before).float().square().mean()
            stream.advance(index)
            bar.set_postfix(loss=f"{float(loss):.3g}")
            bar.update()


def _round_block(
    stream: BlockStream, index: int, groups: list[tuple[str, ...]], schemes: dict[str, QuantizationScheme]
) -> None:
    """Round the layers of a block, in place, one group after another."""
    block = stream.blocks[index]
    for group in groups:
        layers = {name: _layer(block, name) for name in group}
        first = next(iter(layers.values()))
        hessian = _hessian(stream, index, first, f"block {index}, {group[0]}")
        for name, layer in layers.items():
            grid = schemes[name].grid(layer.weight)
            integers = gptq_round(layer.weight, hessian, grid, damping=schemes[name].gptq_damping)
            block.set_submodule(name, layer.rounded(grid, integers))


def _rounding(block: nn.Module, name: str) -> dict[str, Tensor]:
    """Return integers, scales and zero points of a rounded layer, by the names of its tensors in the block."""
    layer, parts = _layer(block, name), ("weight", "weight_scale", "weight_zero_point")
    return {f"{name}.{part}": tensor for part in parts if (tensor := getattr(layer, part)) is not None}


def _layer(block: nn.Module, name: str) -> QuantizedLinear:
    layer = block.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    return layer


def _hessian(stream: BlockStream, index: int, layer: QuantizedLinear, where: str) -> Float[Tensor, "inputs inputs"]:
    """Return the mean of x^T x over the calibration tokens, as the layer's product sees them."""
    total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
    for batch in range(len(stream.batches)):
        x = layer.seen(stream.inputs(index, layer, batch)).float()
        total += x.T @ x
    if not total.isfinite().all():
        raise SparqError(f"the inputs of {where} are NaN or infinite on the calibration data; check the model")
    return total / stream.num_tokens
