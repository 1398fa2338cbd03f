"""Any causal LM, outside of a recipe: quantize it on a text, and measure its perplexity on another."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparq.errors import SparqError
from sparq.evaluation.perplexity import Perplexity, prose_perplexity
from sparq.files import atomic_path
from sparq.models import load_model
from sparq.quantization import QuantizationScheme, load_quantized, quantize, save_quantized, to_integers
from sparq.quantization.storage import is_quantized
from sparq.recipes.prose import load_tokenizer, prose_pieces


def quantize_causal_lm(
    reference: str,
    out: Path,
    scheme: QuantizationScheme,
    *,
    attention: str | None = None,
    calibration: Path | None = None,
    tokens: int = 16384,
    context: int = 1024,
) -> int:
    """Quantize a causal LM and write it, with its tokenizer, as a folder that `load_quantized` reads.

    Args:
        reference: a folder, a hub name or `pretrained:NAME`.
        out: the folder; it must not exist, and is whole or absent afterwards.
        scheme: what to do.
        attention: the attention to run it with; that of its config by default.
        calibration: a text, for schemes that need one.
        tokens: how many of its tokens to use.
        context: most tokens of a sequence.

    Returns:
        The bytes of the weights' file.

    Raises:
        SparqError: the model, the text or the scheme do not fit each other.
    """
    if out.exists():
        raise SparqError(f"{out} exists: choose a folder that does not, nothing is overwritten")
    check_calibration(scheme, calibration)
    if is_quantized(Path(reference)):
        raise SparqError(f"{reference} is quantized already: start from the model in floating point")
    model = load_model(reference, attention)
    tokenizer = load_tokenizer(reference)
    batches: list[torch.Tensor] = []
    if calibration is not None:
        pieces = prose_pieces(model, tokenizer, calibration, tokens=tokens, context=context)
        found = sum(len(piece) for piece in pieces)
        if found < tokens - 1:  # a last piece of one token is left out
            raise SparqError(
                f"{calibration} has {found} tokens, fewer than the {tokens} of --tokens: give a longer text, or fewer"
            )
        batches = [piece[None] for piece in pieces]
    quantized = quantize(model, batches, scheme)
    with atomic_path(out) as folder:
        save_quantized(quantized, folder)
        tokenizer.save_pretrained(folder)
    return (out / "model.safetensors").stat().st_size


def check_calibration(scheme: QuantizationScheme, calibration: Path | None) -> None:
    """Check that a text is given exactly where it is read.

    Raises:
        SparqError: it is missing, or would not be read.
    """
    if scheme.needs_calibration and calibration is None:
        raise SparqError(f"{scheme.name} needs calibration data: give a text with --calibration FILE")
    if calibration is not None and not scheme.needs_calibration:
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
    if integers:
        to_integers(model)
    pieces = prose_pieces(model, loaded, text, tokens=tokens, context=context)
    window = min(context, model.config.max_position_embeddings)
    return prose_perplexity(model, torch.cat(pieces), context=window)
