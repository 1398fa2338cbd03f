"""Batched generation from task prompts."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from sparq.tokens import JointVocabulary
from sparq.tokens.special import END, PAD


@torch.inference_mode()
def generate_targets(
    model: PreTrainedModel,
    vocabulary: JointVocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 32,
    temperature: float | None = None,
    on_done: Callable[[int], object] = int,
) -> list[list[int]]:
    """Return what the model generates after each prompt, up to its end token (left out) or `max_new_tokens`.

    Prompts of like length go together, padded on the left; the result is in the order given.

    Args:
        model: a SpeechLM.
        vocabulary: its vocabulary.
        prompts: ids that end with a generate token.
        max_new_tokens: the bound on what is generated.
        num_beams: 1 is greedy; the papers use 5.
        batch_size: prompts at a time.
        temperature: of draws from the model; None takes the likeliest.
        on_done: told how many prompts were finished, after each batch.
    """
    pad, end = vocabulary.token_id(PAD), vocabulary.token_id(END)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in group)
        input_ids = torch.full((len(group), length), pad)
        mask = torch.zeros(len(group), length, dtype=torch.long)
        for row, index in enumerate(group):
            input_ids[row, length - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
            mask[row, length - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=temperature is not None,
            temperature=temperature,
            pad_token_id=pad,
            eos_token_id=end,
        )
        for row, index in enumerate(group):
            ids = output[row, length:].tolist()
            results[index] = ids[: ids.index(end)] if end in ids else [i for i in ids if i != pad]
        on_done(len(group))
    return results


def stream_target(
    model: PreTrainedModel, vocabulary: JointVocabulary, prompt: Sequence[int], *, max_new_tokens: int
) -> Iterator[int]:
    """Yield what the model generates greedily after a prompt, each id as soon as it is known, up to its end token.

    The model works when an id is asked for, in the asking thread. transformers' `generate` would hand ids over only
    from a thread of its own, and every thread that computes brings OpenMP threads: with more of those than cores they
    sleep between products instead of waiting awake, which doubled the time of a step.

    Args:
        model: a SpeechLM.
        vocabulary: its vocabulary.
        prompt: ids that end with a generate token.
        max_new_tokens: the bound on what is generated.
    """
    pad, end = vocabulary.token_id(PAD), vocabulary.token_id(END)
    ids, cache = torch.tensor([list(prompt)], device=model.device), None
    for _ in range(max_new_tokens):
        # Left before an id is yielded: the listener computes in its own mode.
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
        token = int(ids)
        if token == end:
            return
        if token != pad:
            yield token
