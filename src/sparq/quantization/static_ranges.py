"""Fixed ranges of activations, from calibration data: no maximum has to be found at run time.

A layer has one range for all tokens, so that its scale can leave the integer product. Ranges of single tokens cannot be
fixed. Those of single channels, s_j, can only be fixed if they leave the product too: X W^T = (X diag(s)^-1) (W
diag(s))^T, where the division is folded into the norm that makes X, or else done at run time (Xiao et al. 2023, arXiv
2211.10438, section 3). That is what `channel` does; the divided input then has one range.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models.families import decoder_blocks, family_of, input_groups, named_linears
from sparq.progress import progress
from sparq.quantization.block_stream import BlockStream
from sparq.quantization.grid import nearest, range_steps
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.observers import CalibrationBatch, input_absmax
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme
from sparq.quantization.smoothquant import FLOOR

SHARES = torch.linspace(1.0, 0.02, 50)
"""Shares of the full range that `mse` tries."""

MSE_VALUES = 1 << 22
"""About how many activations `mse` looks at: those of tokens at equal distances."""


@torch.no_grad()
def fix_ranges(model: PreTrainedModel, scheme: QuantizationScheme, batches: Iterable[CalibrationBatch]) -> None:
    """Give every quantized linear layer of a model the fixed range of its input, in place.

    Ranges are those of what the product will see, transformed but not quantized, in a model whose weights are as they
    are when this is called.

    Args:
        model: all linear layers of its blocks are `QuantizedLinear`.
        scheme: `activation_static` and how activations are quantized.
        batches: calibration data, read once.

    Raises:
        SparqError: as `BlockStream`, or inputs are NaN or infinite.
    """
    with _floating_inputs(model):
        stream, blocks = BlockStream(model, batches), family_of(model).blocks
        with progress("ranges", total=len(stream.blocks), unit="block") as bar:
            for index, block in enumerate(decoder_blocks(model)):
                for names in input_groups(model):
                    layers = [block.get_submodule(name) for name in names]
                    first = layers[0]
                    assert isinstance(first, QuantizedLinear)
                    # [tokens, channels] of every batch
                    seen = [
                        first.transformed(stream.inputs(index, first, batch)).float()
                        for batch in range(len(stream.batches))
                    ]
                    if not all(x.isfinite().all() for x in seen):
                        raise SparqError(
                            f"the inputs of block {index}, {names[0]} are NaN or infinite on the calibration data;"
                            " check the model"
                        )
                    found: dict[tuple[int, float], tuple[Tensor, Tensor | None]] = {}
                    for name, layer in zip(names, layers, strict=True):
                        assert isinstance(layer, QuantizedLinear)
                        own = scheme.for_layer(f"{blocks}.{index}.{name}")
                        kind = own.activation_bits, own.activation_clip
                        if kind not in found:
                            found[kind] = static_scale(seen, own)
                        scale, offset = found[kind]
                        layer.activation_scale = scale.reshape(1).clone()
                        if offset is not None:
                            layer.activation_zero_point = offset.reshape(1).to(torch.int8)
                stream.advance(index)
                bar.update()


def static_scale(
    seen: list[Float[Tensor, "_ channels"]], scheme: QuantizationScheme
) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
    """Return scale and, unless activations are symmetric, zero point of all the values together.

    `max` reaches to the extreme values, times `activation_clip`. `percentile` leaves out the share `activation_tail` of
    them, half of it at either end, exactly. `mse` takes, of 50 shares of the full range between 1 and 0.02, the one
    with the least squared error of rounding and clipping.

    Args:
        seen: activations, in several pieces.
        scheme: bits, symmetry, and which range.
    """
    bits, symmetric = scheme.activation_bits, scheme.activation_symmetric
    if scheme.activation_static == "percentile":
        count = sum(x.numel() for x in seen)
        left_out = int(count * scheme.activation_tail / 2)
        high, low = _largest(seen, left_out + 1), -_largest([-x for x in seen], left_out + 1)
    else:
        low = torch.stack([x.amin() for x in seen]).amin()
        high = torch.stack([x.amax() for x in seen]).amax()
    if scheme.activation_static == "max":
        low, high = low * scheme.activation_clip, high * scheme.activation_clip
    if scheme.activation_static != "mse":
        return range_steps(low, high, bits, symmetric=symmetric)
    tokens = torch.cat(seen)
    sample = tokens[:: max(1, tokens.numel() // MSE_VALUES)]
    found = [range_steps(low * share, high * share, bits, symmetric=symmetric) for share in SHARES.tolist()]
    errors = [float((_rounded(sample, scale, offset, bits) - sample).square().mean()) for scale, offset in found]
    return found[min(range(len(found)), key=errors.__getitem__)]


def channel_factors(model: PreTrainedModel, batches: Iterable[CalibrationBatch]) -> dict[str, Float[Tensor, " _"]]:
    """Return max |x_j| of each input channel of every linear layer of the blocks, by the layer's full name.

    A channel that calibration never saw gets the smallest factor, 1e-5.
    """
    blocks = family_of(model).blocks
    groups = [
        tuple(f"{blocks}.{index}.{name}" for name in names)
        for index in range(len(decoder_blocks(model)))
        for names in input_groups(model)
    ]
    largest: Mapping[str, Tensor] = input_absmax(model, batches, [names[0] for names in groups])
    return {name: largest[names[0]].clamp(min=FLOOR) for names in groups for name in names}


def _largest(pieces: list[Tensor], rank: int) -> Tensor:
    """Return the value of that rank among all, from 1 for the largest."""
    kept = pieces[0].new_empty(0)
    for piece in pieces:
        values = torch.cat([kept, piece.flatten()])
        kept = values.topk(min(rank, len(values)), sorted=False).values
    return kept.amin()


def _rounded(x: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    integers = nearest(x, scale, offset, bits)
    return (integers if offset is None else integers.sub_(offset)).mul_(scale)


@contextlib.contextmanager
def _floating_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Leave the inputs of all linear layers as they are for a while."""
    layers = [layer for _, layer in named_linears(model) if isinstance(layer, QuantizedLinear)]
    bits = [layer.activation_bits for layer in layers]
    try:
        for layer in layers:
            layer.activation_bits = FLOAT_BITS
        yield
    finally:
        for layer, own in zip(layers, bits, strict=True):
            layer.activation_bits = own
