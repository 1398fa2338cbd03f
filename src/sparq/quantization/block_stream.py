"""Calibration data on its way through a model, one decoder block at a time.

Memory holds the hidden states before one block, and no activation inside any. A block is called with what the model
itself would have given it: masks, positions, rotary embeddings. Families need no code of their own.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models.families import decoder_blocks
from sparq.quantization.observers import CalibrationBatch, checked_batch


class _EnoughSeenError(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextlib.contextmanager
def _puts_out(block: nn.Module, result: list[Any]) -> Iterator[None]:
    """Make a block return the element of `result` instead of computing, while this lasts."""
    own = vars(block).get("forward")
    block.forward = lambda *_args, **_kwargs: result[0]
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


@dataclass
class _Batch:
    states: Float[Tensor, "batch length hidden"]
    kept: Bool[Tensor, " tokens"]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class BlockStream:
    """The hidden states of calibration batches before a block; starts before the first.

    Args:
        model: a causal LM; its first block is run, unquantized, and the others are called, to see what with.
        batches: token ids, or mappings with `attention_mask`; read once and held as hidden states.

    Raises:
        SparqError: there are no tokens, or a batch is not of this model.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[CalibrationBatch]) -> None:
        self.blocks = decoder_blocks(model)
        self.batches: list[_Batch] = []
        for index, batch in enumerate(batches):
            ids, mask = checked_batch(model, batch, index)
            if mask.any():
                self.batches.append(self._capture(model, ids, mask))
        if not self.num_tokens:
            raise SparqError(
                "the calibration data has no tokens; give at least one batch, 512 tokens or more are advised"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches, padding left out."""
        return sum(int(batch.kept.sum()) for batch in self.batches)

    def copy(self) -> "BlockStream":
        """Return a stream of its own states, at the same place."""
        twin = object.__new__(BlockStream)
        twin.blocks = self.blocks
        twin.batches = [_Batch(batch.states.clone(), batch.kept, batch.calls) for batch in self.batches]
        return twin

    @torch.no_grad()
    def inputs(self, index: int, layer: nn.Module, batch: int) -> Float[Tensor, "tokens channels"]:
        """Return what `layer`, which is inside the block before which the stream is, receives for one batch."""
        seen: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # OPT flattens batch and length before its MLP, Llama does not.
            seen.append(args[0].flatten(0, -2)[self.batches[batch].kept])
            raise _EnoughSeenError

        handle = layer.register_forward_pre_hook(hook)
        try:
            self.call(index, batch)
        except _EnoughSeenError:
            return seen[0]
        finally:
            handle.remove()
        raise AssertionError("the block does not use the layer")

    def call(self, index: int, batch: int) -> Float[Tensor, "batch length hidden"]:
        """Run a block on a batch's states."""
        args, kwargs = self.batches[batch].calls[index]
        result = self.blocks[index](self.batches[batch].states, *args, **kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the states before a block by those behind it, as the block is now."""
        for number, batch in enumerate(self.batches):
            batch.states = self.call(index, number)

    @torch.no_grad()
    def _capture(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> _Batch:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            positional = list(args)
            own = kwargs.pop("hidden_states") if "hidden_states" in kwargs else positional.pop(0)
            if not states:
                states.append(own.clone())
            calls.append((tuple(positional), kwargs))

        first: list[Any] = []
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(self.blocks[0].register_forward_hook(lambda *args: first.append(args[2])).remove)
            for block in self.blocks[1:]:
                # What a block is called with depends on no hidden states, so what they are does not matter here.
                stack.enter_context(_puts_out(block, first))
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert len(calls) == len(self.blocks), "every block is called once"
        return _Batch(states[0], mask.flatten().bool(), calls)
