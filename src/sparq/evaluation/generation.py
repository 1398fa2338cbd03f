"""Batched generation from task prompts."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

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
            input_ids=input_ids,
            attention_mask=mask,
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

    The model runs in a thread of its own, so that what is done with an id overlaps with finding the next. Whoever
    stops listening early ends the generation.

    Args:
        model: a SpeechLM.
        vocabulary: its vocabulary.
        prompt: ids that end with a generate token.
        max_new_tokens: the bound on what is generated.
    """
    ids: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    pad, end = vocabulary.token_id(PAD), vocabulary.token_id(END)

    def generate() -> None:
        try:
            input_ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                    eos_token_id=end,
                    streamer=_Queue(ids, stopped),
                )
        except _StoppedError:
            pass
        except BaseException as error:  # it belongs to the listener's thread
            ids.put(error)
        finally:
            ids.put(None)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        while (item := ids.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item not in (pad, end):
                yield item
    finally:
        stopped.set()
        thread.join()


class _StoppedError(Exception):
    """Nobody listens any more."""


class _Queue(BaseStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Hands over generated ids; transformers shows it the prompt first."""

    def __init__(self, ids: "queue.SimpleQueue[int | BaseException | None]", stopped: threading.Event) -> None:
        self._ids, self._stopped, self._is_prompt = ids, stopped, True

    def put(self, value: Tensor) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        if not self._is_prompt:
            for item in value.flatten().tolist():
                self._ids.put(int(item))
        self._is_prompt = False

    def end(self) -> None:
        """The last id was put; `generate` tells the listener."""
