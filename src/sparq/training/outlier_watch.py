"""The outliers of a model while it trains, measured where it is validated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sparq.data import Batch
from sparq.training.block_outputs import BlockOutputs
from sparq.training.outlier_penalty import token_kurtosis, token_max_norm


class ValidOutliers(NamedTuple):
    """The outliers of the blocks' outputs on a validation set.

    Attributes:
        max_norm: the largest absolute element.
        kurtosis: E[(x - mean)^4] / E[(x - mean)^2]^2 over the channels of a token, averaged over tokens and blocks:
            `sparq.measure_outliers` with `reduction="token"`.
        block: which gives the largest element first, from 0.
    """

    max_norm: float
    kurtosis: float
    block: int


class OutlierWatch:
    """Adds up the outliers of batches as the model reads them.

    Args:
        model: a causal LM, with or without adapters.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._outputs = BlockOutputs(model, self._see)
        self._reset()

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Count what the model reads meanwhile."""
        with self._outputs.watching(batch):
            yield
        self._num_tokens += sum(batch.lengths)

    def take(self) -> ValidOutliers:
        """Return the outliers of what was read since the last call."""
        assert self._num_tokens, "the model has read nothing"
        largest, kurtosis = (torch.stack(parts).cpu() for parts in (self._largest, self._kurtosis))
        found = ValidOutliers(
            max_norm=float(largest.max()),
            kurtosis=float(kurtosis.mean()) / self._num_tokens,
            block=int(largest.argmax()),
        )
        self._reset()
        return found

    @torch.no_grad()
    def _see(self, index: int, hidden: Float[Tensor, "tokens hidden"]) -> None:
        largest, kurtosis = token_max_norm(hidden).max(), token_kurtosis(hidden).sum(dtype=torch.float64)
        if index == len(self._largest):
            self._largest.append(largest)
            self._kurtosis.append(kurtosis)
        else:
            self._largest[index] = torch.maximum(self._largest[index], largest)
            self._kurtosis[index] = self._kurtosis[index] + kurtosis

    def _reset(self) -> None:
        self._largest: list[Tensor] = []
        self._kurtosis: list[Tensor] = []
        self._num_tokens = 0
