"""Any causal LM, outside of a recipe: quantize it, measure what each part suffers, measure its perplexity."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation.perplexity import Perplexity, prose_perplexity
from sparq.files import atomic_path
from sparq.models import load_model
from sparq.quantization import (
    MixedModel,
    QuantizationScheme,
    SensitivityReport,
    load_quantized,
    quantize,
    quantize_within,
    save_quantized,
    sensitivity,
    to_integers,
)
from sparq.quantization.sensitivity import By
from sparq.quantization.storage import is_quantized
from sparq.recipes.prose import load_tokenizer, prose_pieces
from sparq.recipes.subject import Data, is_speechlm, load_subject


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How good a model of mixed bits has to be.

    Attributes:
        share: how much of itself each perplexity may rise; None for any.
        points: by how many points a SpeechLM's word error rate may rise; None for any.
        better: settings of promoted parts.
        by: what is promoted together.
    """

    share: float | None = None
    points: float | None = None
    better: dict[str, int | float]
    by: By = "layer"


def quantize_causal_lm(
    reference: str,
    out: Path,
    scheme: QuantizationScheme,
    data: Data,
    *,
    attention: str | None = None,
    budget: Budget | None = None,
    resume: Path | None = None,
) -> MixedModel | None:
    """Quantize a causal LM and write it, with its tokenizer, as a folder that `load_quantized` reads.

    Args:
        reference: a folder, a hub name, `pretrained:NAME`, or a trained SpeechLM, RUN/models/FRAMEWORK.
        out: the folder; it must not exist, and is whole or absent afterwards.
        scheme: what to do.
        data: what to calibrate on, for schemes that need it, and to measure a budget on.
        attention: the attention to run it with; that of its config by default.
        budget: give more bits to parts until it is kept; None for the scheme as it is.
        resume: as for `quantize`, without a budget.

    Returns:
        What became of the budget.

    Raises:
        SparqError: the model, the data, the scheme and the budget do not fit each other.
    """
    if out.exists():
        raise SparqError(f"{out} exists: choose a folder that does not, nothing is overwritten")
    check_calibration(reference, scheme, data)
    subject = load_subject(reference, data, calibrates=scheme.needs_calibration, attention=attention)
    mixed = None
    if budget is None:
        quantized = quantize(subject.model, subject.calibration, scheme, resume=resume)
    else:
        mixed = quantize_within(
            subject.model, subject.calibration, scheme, subject.measure(), budget=budget.share, points=budget.points,
            error_rates=None if budget.points is None else subject.error_rates(), better=budget.better, by=budget.by,
        )  # fmt: skip
        quantized = mixed.model
    with atomic_path(out) as folder:
        save_quantized(quantized, folder)
        subject.save_tokenizer(folder)
    return mixed


def causal_lm_sensitivity(
    reference: str, scheme: QuantizationScheme, data: Data, *, attention: str | None = None, by: By = "layer"
) -> SensitivityReport:
    """Return what each part of a model suffers when it alone is quantized; arguments as in `quantize_causal_lm`."""
    check_calibration(reference, scheme, data)
    subject = load_subject(reference, data, calibrates=scheme.needs_calibration, attention=attention)
    return sensitivity(subject.model, subject.calibration, scheme, subject.measure(), by=by)


def check_calibration(reference: str, scheme: QuantizationScheme, data: Data) -> None:
    """Check that a text is given exactly where it is read.

    Raises:
        SparqError: it is missing, or would not be read.
    """
    given = data.calibration is not None
    if scheme.needs_calibration and not given and not is_speechlm(reference):
        raise SparqError(f"{scheme.name} needs calibration data: give a text with --calibration FILE")
    if given and not scheme.needs_calibration:
        raise SparqError(f"{scheme.name} reads no calibration data: leave --calibration out")


def text_perplexity(
    reference: str,
    text: Path | None = None,
    *,
    attention: str | None = None,
    tokenizer: str | None = None,
    tokens: int = 8192,
    context: int = 2048,
    integers: bool = False,
) -> Perplexity:
    """Return the perplexity of running text under a causal LM, quantized or not, in windows of `context` tokens.

    Args:
        reference: a folder that `save_quantized` wrote, or as in `quantize_causal_lm`.
        text: a text file; the demo's page of prose by default.
        attention: the attention to run a model with that is not quantized; that of its config by default.
        tokenizer: where the tokenizer is, if not with the model.
        tokens: most tokens.
        context: tokens of a window, at most as many as the model takes.
        integers: compute with integers; the model must be quantized.

    Raises:
        SparqError: the model or the text does not fit, or the model cannot compute with integers.
    """
    quantized = is_quantized(Path(reference))
    if quantized and attention is not None:
        raise SparqError(f"{reference} is quantized under its attention: leave --attention out")
    if integers and not quantized:
        raise SparqError(f"{reference} is not quantized: --integers needs a folder that sparq quantize wrote")
    loaded: PreTrainedTokenizerBase = load_tokenizer(tokenizer or reference)
    model: PreTrainedModel = load_quantized(Path(reference)) if quantized else load_model(reference, attention)
    model.to(compute_device())
    if integers:
        to_integers(model)
    pieces = prose_pieces(model, loaded, text, tokens=tokens, context=context)
    window = min(context, model.config.max_position_embeddings)
    return prose_perplexity(model, torch.cat(pieces), context=window)
