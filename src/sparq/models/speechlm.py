"""A pretrained LLM with the joint vocabulary in place of its own: the SpeechLM before adaptation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from sparq.models.loading import LoadedBackbone, load_backbone
from sparq.pretrained.quiet import quiet_transformers
from sparq.tokens.special import END, PAD
from sparq.tokens.vocabulary import JointVocabulary


@dataclass(frozen=True, kw_only=True)
class JointEmbedding:
    """The embedding rows of a joint vocabulary and where they came from."""

    rows: Float[Tensor, "pieces hidden"]
    num_copied: int


def joint_embedding(
    pretrained: Float[Tensor, "old_pieces hidden"],
    pretrained_ids: dict[str, int],
    pieces: list[str],
    *,
    noise: float,
    seed: int,
) -> JointEmbedding:
    """Start the rows of the joint vocabulary from the pretrained ones.

    A piece that the pretrained vocabulary has too keeps its row. Any other starts from the mean row plus
    noise * N(0, diag(variance of the rows)): with the bare mean all unit tokens would be one token at first, and the
    gradient would have to tell them apart before it could teach what they mean.

    Args:
        pretrained: embedding of the pretrained model.
        pretrained_ids: its vocabulary, byte-level BPE or SentencePiece spelling.
        pieces: the joint vocabulary in the order of ids, SentencePiece spelling.
        noise: how many standard deviations; 0 is the bare mean.
        seed: of the noise; the same for every framework.
    """
    pretrained = pretrained.detach().float()
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = pretrained.mean(dim=0), pretrained.std(dim=0)
    rows = mean + noise * deviation * torch.randn(len(pieces), pretrained.shape[1], generator=generator)
    copied = 0
    for index, piece in enumerate(pieces):
        # Byte-level BPE (GPT-2, OPT, SmolLM2) writes the word boundary as Ġ, SentencePiece as ▁.
        known = pretrained_ids.get(piece.replace("▁", "Ġ"), pretrained_ids.get(piece))
        if known is not None and known < len(pretrained) and not piece.startswith("<"):
            rows[index] = pretrained[known]
            copied += 1
    return JointEmbedding(rows=rows, num_copied=copied)


def build_speechlm(
    reference: str,
    vocabulary: JointVocabulary,
    *,
    attention: str,
    dtype: torch.dtype = torch.float32,
    noise: float = 1.0,
    seed: int = 0,
) -> tuple[LoadedBackbone, JointEmbedding]:
    """Load a backbone and put the joint vocabulary in place of its own.

    Embedding and head stay tied where the backbone ties them. OPT-350m's projections between embedding and hidden size
    are kept.

    Returns:
        The account of loading, with the model changed, and the new embedding.
    """
    loaded = load_backbone(reference, attention=attention, dtype=dtype)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(reference)
    model = loaded.model
    embedding = joint_embedding(
        model.get_input_embeddings().weight, tokenizer.get_vocab(), vocabulary.pieces, noise=noise, seed=seed
    )
    replace_vocabulary(model, vocabulary, embedding.rows)
    return loaded, embedding


def replace_vocabulary(
    model: PreTrainedModel, vocabulary: JointVocabulary, rows: Float[Tensor, "pieces hidden"]
) -> None:
    """Resize embedding and head to the joint vocabulary and fill both with `rows`."""
    with quiet_transformers():
        model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(rows)
    # A padding index of the old vocabulary would silence the gradient of a row of the new one.
    model.get_input_embeddings().padding_idx = None
    for config in (model.config, model.generation_config):
        config.pad_token_id = vocabulary.token_id(PAD)
        config.eos_token_id = vocabulary.token_id(END)
        config.bos_token_id = None
