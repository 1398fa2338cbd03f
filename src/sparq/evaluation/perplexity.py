"""Perplexity per token: of task sequences, and of plain prose under the backbone's own tokenizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparq.tokens import Example


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(mean negative log-likelihood per counted token).

    Perplexities compare only between models of one vocabulary: the denominator counts its tokens.
    """

    value: float
    num_tokens: int


def _perplexity(nll: float, num_tokens: int) -> Perplexity:
    mean = nll / num_tokens
    return Perplexity(value=math.exp(mean) if mean < 700 else math.inf, num_tokens=num_tokens)


def task_perplexity(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int) -> Perplexity:
    """Return the perplexity of the targets (end token counted) given the prompts, teacher-forced.

    Args:
        model: a SpeechLM.
        examples: of one task, at least one.
        batch_size: sequences at a time; sequences of like length go together.
    """
    assert examples, "perplexity of nothing"
    likelihoods = log_likelihoods(model, examples, batch_size=batch_size)
    return _perplexity(-sum(likelihoods), sum(len(example.target) for example in examples))


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    on_done: Callable[[int], object] = int,
) -> list[float]:
    """Return the log-likelihood of each target (end token counted) given its prompt, in nats, teacher-forced.

    Args:
        model: a SpeechLM.
        examples: in any order.
        batch_size: sequences at a time; sequences of like length go together.
        on_done: told how many were finished, after each batch.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    found = [0.0] * len(examples)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        group = [examples[i] for i in indices]
        length = max(len(e) for e in group)
        input_ids = torch.zeros(len(group), length, dtype=torch.long)
        counted = torch.zeros(len(group), length, dtype=torch.bool)
        for row, example in enumerate(group):
            input_ids[row, : len(example)] = torch.tensor((*example.prompt, *example.target))
            counted[row, len(example.prompt) : len(example)] = True
        input_ids, counted = input_ids.to(model.device), counted.to(model.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        chosen = torch.log_softmax(logits, dim=-1).gather(2, input_ids[:, 1:, None])[..., 0]
        sums = torch.where(counted[:, 1:], chosen.double(), 0.0).sum(dim=1).tolist()
        for index, value in zip(indices, sums, strict=True):
            found[index] = value
        on_done(len(group))
    return found


@torch.inference_mode()
def prose_perplexity(model: PreTrainedModel, token_ids: Int[Tensor, " tokens"], *, context: int = 1024) -> Perplexity:
    """Return the perplexity of running text in windows of `context` tokens, whose first tokens are not counted."""
    nll, tokens = 0.0, 0
    for start in range(0, len(token_ids) - 1, context):
        window = token_ids[None, start : start + context].to(model.device)
        if window.shape[1] < 2:
            break
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        chosen = torch.log_softmax(logits, dim=-1).gather(2, window[:, 1:, None])
        nll -= float(chosen.double().sum())
        tokens += window.shape[1] - 1
    return _perplexity(nll, tokens)
