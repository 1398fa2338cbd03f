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


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, a hub name or `pretrained:NAME`.

    Raises:
        SparqError: there is none.
    """
    folder = Path(reference)
    place = reference if folder.is_dir() else resolve_model(reference)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise SparqError(f"{reference} has no tokenizer that can be read: name the model that it belongs to") from error
    return tokenizer


def prose_pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path | None, *, tokens: int, context: int
) -> tuple[Int[Tensor, " length"], ...]:
    """Return running text as sequences of 2 or more tokens.

    Args:
        model: a causal LM, whose longest sequence bounds the context.
        tokenizer: the model's.
        text: a file; the demo's page of prose by default. Line breaks count as spaces.
        tokens: most tokens in all.
        context: most tokens of a sequence.

    Raises:
        SparqError: the text has fewer than 2 tokens, or tokens that the model does not know.
    """
    ids = tokenizer(" ".join(read_prose(text).split()), return_tensors="pt").input_ids[0, :tokens].long()
    if len(ids) < 2:
        raise SparqError(f"{text or 'the text'} has {len(ids)} tokens: give 2 or more")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= vocabulary:
        raise SparqError(
            f"{text or 'the text'} has the token id {int(ids.max())}, but the model's vocabulary has {vocabulary}"
            " tokens: the tokenizer is another model's"
        )
    pieces = ids.split(min(context, model.config.max_position_embeddings))
    return tuple(piece for piece in pieces if len(piece) > 1)
