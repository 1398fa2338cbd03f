"""How much each part of a model suffers when it alone is quantized.

Both models live in one basis: the float one is the model with the method's exact changes (smoothing, rotation) and
nothing rounded, the other one has everything rounded. A part is measured by putting its layers of the second into the
first.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError, unknown
from sparq.models.families import family_of, named_linears
from sparq.progress import progress
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.packing import packed_columns
from sparq.quantization.quantize import quantize
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme

Measure = Callable[[PreTrainedModel], Mapping[str, float]]
"""Returns mean losses of a model in nats a token, by the name of what they are measured on: a text, tasks."""

By = Literal["layer", "block", "kind"]
BY: tuple[By, ...] = get_args(By)


@dataclass(frozen=True, kw_only=True)
class PartSensitivity:
    """What quantizing one part does.

    Attributes:
        part: name of the layer, the block, or the kind of layer in all blocks.
        layers: full names of its linear layers.
        num_weights: how many weights these have.
        loss_change: loss with this part quantized less that of the float model, by what it is measured on, in nats a
            token.
    """

    part: str
    layers: tuple[str, ...]
    num_weights: int
    loss_change: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest change of a loss."""
        return max(self.loss_change.values())


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """The sensitivity of all parts.

    Attributes:
        full: losses of the model in floating point.
        quantized: losses with all linear layers quantized, and with what else the scheme quantizes.
        parts: in the order of the model.
    """

    full: Mapping[str, float]
    quantized: Mapping[str, float]
    parts: Sequence[PartSensitivity]


def sensitivity(
    model: PreTrainedModel,
    calibration: Iterable[CalibrationBatch] | None,
    scheme: QuantizationScheme,
    measure: Measure,
    *,
    by: By = "layer",
) -> SensitivityReport:
    """Measure each part of a model as the only quantized one.

    With error compensation a layer's integers are those of the wholly quantized model: they make up for errors of
    layers before, which are in floating point here.

    Args:
        model: a causal LM, left as it was; two copies of it are in memory.
        calibration: as for `quantize`.
        scheme: what to do; `omniquant` and `affinequant` have no float model in their basis.
        measure: the losses of a model, at least one; called once a part and twice more.
        by: what a part is: a linear `layer`, all of a `block`, or all of a `kind` in all blocks.

    Raises:
        SparqError: as `quantize`, or the scheme is of no use here.
    """
    if by not in BY:
        raise unknown("part", by, BY)
    batches = None if calibration is None else list(calibration)
    floating = quantize(model, batches, floating_scheme(scheme))
    rounded = quantize(model, batches, scheme)
    full = dict(measure(floating))
    parts = []
    groups = parts_of(model, by)
    with progress(f"sensitivity {scheme.name}", total=len(groups), unit=by) as bar:
        for part, names in groups.items():
            with layers_from(rounded, floating, names):
                found = measure(floating)
            weights = sum(quantized_layer(rounded, name).weight.numel() for name in names)
            change = {key: found[key] - full[key] for key in full}
            parts.append(PartSensitivity(part=part, layers=tuple(names), num_weights=weights, loss_change=change))
            bar.update()
    return SensitivityReport(full=full, quantized=dict(measure(rounded)), parts=parts)


def floating_scheme(scheme: QuantizationScheme) -> QuantizationScheme:
    """Return the scheme that makes the same exact changes and rounds nothing.

    Raises:
        SparqError: the method's changes depend on its rounding, or it rounds nothing.
    """
    if scheme.learns or scheme.distills:
        raise SparqError(f"{scheme.method} trains all layers together with their rounding: layers cannot stand alone")
    if scheme.weight_bits == scheme.activation_bits == FLOAT_BITS:
        raise SparqError(f"{scheme.name} quantizes no linear layer")
    if scheme.activation_granularity == "channel":
        raise SparqError(
            "activation_granularity 'channel' changes weights for quantized inputs: layers cannot stand alone"
        )
    bits = [field.name for field in dataclasses.fields(scheme) if field.name.endswith("_bits")]
    changes: dict[str, Any] = {"layers": {}, **dict.fromkeys(bits, FLOAT_BITS)}
    return dataclasses.replace(scheme, **changes)


def parts_of(model: PreTrainedModel, by: By) -> dict[str, list[str]]:
    """Return the full names of the linear layers of each part."""
    blocks = re.escape(family_of(model).blocks)
    parts: dict[str, list[str]] = {}
    for name, _ in named_linears(model):
        found = re.fullmatch(rf"({blocks}\.\d+)\.(.+)", name)
        assert found is not None
        parts.setdefault({"layer": name, "block": found[1], "kind": found[2]}[by], []).append(name)
    return parts


@contextlib.contextmanager
def layers_from(source: nn.Module, target: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put layers of one model into another for a while."""
    own = {name: target.get_submodule(name) for name in names}
    try:
        for name in own:
            target.set_submodule(name, source.get_submodule(name))
        yield
    finally:
        for name, layer in own.items():
            target.set_submodule(name, layer)


def quantized_layer(model: nn.Module, name: str) -> QuantizedLinear:
    """Return a linear layer of a quantized model."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    return layer


def weight_bytes(model: PreTrainedModel, scheme: QuantizationScheme) -> int:
    """Return the bytes that the integer weights of the blocks take in a file, scales and zero points left out."""
    total = 0
    for name, layer in named_linears(model):
        assert isinstance(layer.weight, Tensor)
        rows, columns = layer.weight.shape
        total += rows * packed_columns(columns, scheme.for_layer(name).weight_bits)
    return total
