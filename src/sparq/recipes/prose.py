"""Plain text cut into sequences for a causal LM."""

from importlib.resources import files
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparq.errors import SparqError
from sparq.files import read_text
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers


def read_prose(text: Path | None) -> str:
    """Return the text of a file, or the demo's page of prose."""
    return read_text(text) if text else (files("sparq") / "demo" / "prose.txt").read_text(encoding="utf-8")


def prose_pieces(
    model: PreTrainedModel, reference: str, text: Path | None, *, tokens: int, context: int
) -> tuple[tuple[Int[Tensor, " length"], ...], PreTrainedTokenizerBase]:
    """Return running text as sequences of 2 or more tokens, and the tokenizer that made them.

    Args:
        model: a causal LM, whose longest sequence bounds the context.
        reference: where it is from; its tokenizer is taken.
        text: a file; the demo's page of prose by default. Line breaks count as spaces.
        tokens: most tokens in all.
        context: most tokens of a sequence.

    Raises:
        SparqError: the text has fewer than 2 tokens.
    """
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(reference))
    ids = tokenizer(" ".join(read_prose(text).split()), return_tensors="pt").input_ids[0, :tokens]
    if len(ids) < 2:
        raise SparqError(f"{text or 'the text'} has {len(ids)} tokens: give 2 or more")
    pieces = ids.split(min(context, model.config.max_position_embeddings))
    return tuple(piece for piece in pieces if len(piece) > 1), tokenizer
