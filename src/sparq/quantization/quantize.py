"""From a causal LM in floating point to one whose decoder blocks compute with integers."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError, unknown
from sparq.models.families import family_of, named_linears
from sparq.progress import progress
from sparq.quantization.attention import check_attention, quantize_attention
from sparq.quantization.compensation import round_with_compensation
from sparq.quantization.distillation import distill, float_examples
from sparq.quantization.embeddings import quantize_embeddings
from sparq.quantization.learned import learn_blocks
from sparq.quantization.linear import QuantizedLinear
from sparq.quantization.observers import CalibrationBatch, input_absmax
from sparq.quantization.resume import BlockStore
from sparq.quantization.rotation import rotate
from sparq.quantization.scheme import EMBEDDING_GROUPS, FLOAT_BITS, QuantizationScheme
from sparq.quantization.smoothquant import fold_into_norms, model_smoothing_factors, smoothed_groups
from sparq.quantization.static_ranges import channel_factors, fix_ranges

_START_TOKENS = 16384
"""Positions of calibration data that GPTQ sees ahead of training: more of them gained nothing."""

CONFIG_KEY = "sparq_quantization"
"""The attribute of a quantized model's config that holds its scheme as a dict."""


def quantize(
    model: PreTrainedModel,
    calibration: Iterable[CalibrationBatch] | None = None,
    scheme: QuantizationScheme | None = None,
    *,
    resume: Path | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Return a quantized copy of a causal LM; the model itself is left as it was.

    All linear layers of the decoder blocks are quantized. Norms and OPT's project_in and project_out stay in floating
    point; so do embedding and head unless `embedding_bits` says else, and the attention's products and the KV cache
    unless `query_bits`, `key_bits`, `value_bits` or `probability_bits` do. The copy shares no
    storage with the model; only `rotation` and `best` copy the float weights of the quantized layers. It is in
    evaluation mode and its parameters are frozen, for inference.

        quantized = quantize(model, batches, method="smoothquant", weight_bits=8, activation_bits=8)

    Args:
        model: a causal LM of a supported family, adapters merged.
        calibration: batches of token ids, or mappings with `input_ids` and `attention_mask` (padding is left
            out); read once, and held. `labels` tell `best` which tokens count (-100: not). A scheme that rounds to
            nearest without smoothing does not read it.
        scheme: what to do.
        resume: a folder for what is finished, of schemes that round by GPTQ or train: an interrupted call goes on from
            it, and ends with the same bits on the same machine. It can be removed afterwards.
        **settings: the fields of a `QuantizationScheme`, instead of `scheme`.

    Raises:
        SparqError: the model is of an unsupported family, wrapped by PEFT, already quantized or not finite; a
            group size does not divide a layer; the calibration data is missing, empty or not of this model's
            vocabulary.
    """
    if scheme is None:
        scheme = QuantizationScheme.from_dict(settings)
    elif settings:
        raise SparqError(f"give a scheme or its settings, not both (got a scheme and {', '.join(settings)})")
    linears = _checked_linears(model, scheme)

    if scheme.needs_calibration and calibration is None:
        raise SparqError(f"{scheme.name} needs calibration data: batches of token ids like those the model will see")
    batches = [] if calibration is None or not scheme.needs_calibration else list(calibration)

    store = None
    if resume is not None:
        if not scheme.resumes:
            raise SparqError(f"{scheme.name} is done in seconds, nothing of it is kept: leave resume out")
        store = BlockStore(resume, model, scheme, batches)
    factors: dict[str, Tensor] = {}
    if scheme.method == "smoothquant":
        absmax = input_absmax(model, batches, [names[0] for _, names in smoothed_groups(model)])
        factors = model_smoothing_factors(model, absmax, scheme.smoothing_alpha)
    if scheme.fixes_ranges and scheme.activation_granularity == "channel":
        factors = channel_factors(model, batches)
    return _quantized_copy(model, scheme, linears, factors, batches, store)


def scheme_of(model: PreTrainedModel) -> QuantizationScheme | None:
    """Return the scheme that a model was quantized with, or None where it is not quantized."""
    settings = getattr(model.config, CONFIG_KEY, None)
    return None if settings is None else QuantizationScheme.from_dict(settings)


def _checked_linears(model: PreTrainedModel, scheme: QuantizationScheme) -> dict[str, nn.Linear]:
    adapters = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    if any(isinstance(module, adapters) for module in model.modules()):
        raise SparqError("the model has PEFT adapters: merge them first, with model.merge_and_unload()")
    family_of(model)
    if scheme_of(model) is not None:
        raise SparqError("the model is already quantized: start from the model in floating point")
    names = [name for name, _ in named_linears(model)]
    for name in scheme.layers:
        if name not in names:
            raise unknown("layer", name, names)
    linears: dict[str, nn.Linear] = {}
    for name, linear in named_linears(model):
        if type(linear) is not nn.Linear:
            raise SparqError(f"{name} is a {type(linear).__name__}, only nn.Linear can be quantized")
        grouped = scheme.weight_bits != FLOAT_BITS or scheme.activation_granularity == "group"
        if grouped and scheme.group_size and linear.in_features % scheme.group_size:
            raise SparqError(
                f"group_size {scheme.group_size} does not divide the {linear.in_features} input features of {name}"
            )
        if not linear.weight.isfinite().all():
            raise SparqError(f"the weights of {name} have a NaN or an infinity: the model is broken")
        linears[name] = linear
    _check_embeddings(model, scheme)
    check_attention(model, scheme)
    return linears


def _check_embeddings(model: PreTrainedModel, scheme: QuantizationScheme) -> None:
    if scheme.embedding_bits == FLOAT_BITS:
        return
    for name, layer in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        group = EMBEDDING_GROUPS[scheme.embedding_bits]
        if group and layer.weight.shape[1] % group:
            raise SparqError(
                f"the {name} has {layer.weight.shape[1]} channels: embedding_bits {scheme.embedding_bits} needs a"
                f" multiple of {group}, embedding_bits 5 does not"
            )
        if not layer.weight.isfinite().all():
            raise SparqError(f"the weights of the {name} have a NaN or an infinity: the model is broken")


def _start(batches: list[CalibrationBatch]) -> list[CalibrationBatch]:
    """Return the first batches, as many as GPTQ needs to be the start of a training."""
    chosen: list[CalibrationBatch] = []
    positions = 0
    for batch in batches:
        if positions < _START_TOKENS:
            chosen.append(batch)
            positions += (batch["input_ids"] if isinstance(batch, Mapping) else batch).numel()
    return chosen


@torch.no_grad()
def _quantized_copy(
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    linears: dict[str, nn.Linear],
    factors: dict[str, Float[Tensor, " _"]],
    batches: list[CalibrationBatch],
    store: BlockStore | None,
) -> PreTrainedModel:
    # Memory: unless they are rotated, the copy shares the linear layers until each is replaced by its counterpart.
    shared = {} if scheme.rotates else {id(linear): linear for linear in linears.values()}
    result: PreTrainedModel = copy.deepcopy(model, shared).eval()
    at_run_time = fold_into_norms(result, factors) if factors else set()
    at_run_time |= factors.keys() - {name for _, names in smoothed_groups(result) for name in names}
    if scheme.rotates:
        rotate(result, scheme.seed)
    if scheme.learns:
        learn_blocks(result, scheme, batches, store)
    examples = float_examples(result, batches) if scheme.distills else []
    if not scheme.distills:
        quantize_attention(result, scheme)
    make = QuantizedLinear.floating if scheme.compensates else QuantizedLinear.round_to_nearest
    down = family_of(model).down
    left = [(name, layer) for name, layer in named_linears(result) if isinstance(layer, nn.Linear)]
    with progress(f"quantize {scheme.name}", total=len(left), unit="layer") as bar:
        for name, linear in left:
            hadamard = scheme.rotates and name.endswith(f".{down}")
            layer = make(
                linear, scheme.for_layer(name), factor=factors.get(name), divide_input=name in at_run_time,
                hadamard=hadamard,
            )  # fmt: skip
            result.set_submodule(name, layer)
            bar.update()
    if scheme.fixes_ranges:
        fix_ranges(result, scheme, batches)
    if scheme.compensates:
        round_with_compensation(result, scheme, _start(batches) if scheme.distills else batches, store)
    if scheme.distills:
        distill(result, scheme, examples, store)
        # Its rounding has no gradient, so the scales are trained without it.
        quantize_attention(result, scheme)
    if scheme.embedding_bits != FLOAT_BITS:
        quantize_embeddings(result, scheme.embedding_bits)
    setattr(result.config, CONFIG_KEY, scheme.to_dict())
    return result.requires_grad_(False)
