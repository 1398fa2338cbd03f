"""Watching what the blocks of a model give while it reads a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.data import Batch
from sparq.models.families import decoder_blocks


class BlockOutputs:
    """What each block gives for the tokens of a batch, packed or padded; padding is left out.

    Args:
        model: a causal LM, with or without adapters.
        see: is called with a block's number and its output, in the order of the blocks.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, see: Callable[[int, Float[Tensor, "tokens hidden"]], None]
    ) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._blocks = decoder_blocks(base)
        self.num_blocks = len(self._blocks)
        self._see = see

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Watch while the model reads a batch."""
        handles = [
            block.register_forward_hook(partial(self._hook, index, batch.lengths))
            for index, block in enumerate(self._blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, lengths: Sequence[int], _block: nn.Module, _args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.shape[0] > 1 or hidden.shape[1] > sum(lengths):
            # Padded rows; a packed one has nothing else than tokens.
            counts = torch.tensor(lengths, device=hidden.device)
            hidden = hidden[torch.arange(hidden.shape[1], device=hidden.device) < counts[:, None]]
        self._see(index, hidden.flatten(0, -2))
