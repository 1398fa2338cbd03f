"""Running norm and kurtosis of one tensor of a model, over any number of sequences."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparq.errors import SparqError
from sparq.evaluation.moments import Moments, kurtosis

Reduction = Literal["sequence", "tensor", "token"]
"""Whose elements one kurtosis is taken over: those of a sequence, of the whole data, or of one token."""


class ActivationSums:
    """What is known of a tensor after each sequence; no activation is kept.

    Args:
        name: of the tensor, for messages.
        reduction: whose elements one kurtosis is taken over.
    """

    def __init__(self, name: str, reduction: Reduction) -> None:
        self.name = name
        self.max_inf_norm = -1.0
        self.argmax = (0, 0)
        """Token and channel of the largest element."""
        self._reduction = reduction
        self._inf_norm_sum = 0.0
        self._num_sequences = 0
        self._kurtosis_sum = 0.0
        self._num_kurtoses = 0
        self._moments: Moments | None = None

    def add(self, values: Float[Tensor, "tokens width"]) -> None:
        """Count one sequence without its padding.

        Raises:
            SparqError: an element is not finite.
        """
        inf_norm, place = finite_inf_norm(values, self.name)
        if inf_norm > self.max_inf_norm:
            self.max_inf_norm, self.argmax = inf_norm, divmod(place, values.shape[-1])
        self._inf_norm_sum += inf_norm
        self._num_sequences += 1
        if self._reduction == "tensor":
            moments = Moments.of(values)
            self._moments = moments if self._moments is None else self._moments.merge(moments)
        else:
            kurtoses = kurtosis(values if self._reduction == "token" else values.reshape(1, -1))
            self._kurtosis_sum += kurtoses.sum().item()
            self._num_kurtoses += len(kurtoses)

    @property
    def mean_inf_norm(self) -> float:
        """Mean of max |x| of each sequence."""
        return self._inf_norm_sum / self._num_sequences

    @property
    def kurtosis(self) -> float:
        """The kurtosis, averaged over sequences or tokens if it is taken over those.

        Raises:
            SparqError: it is undefined.
        """
        value = self._moments.kurtosis if self._moments else self._kurtosis_sum / self._num_kurtoses
        if math.isnan(value):
            raise SparqError(
                f"the kurtosis of {self.name} is undefined: the elements of one {self._reduction} are equal"
            )
        return value


def finite_inf_norm(values: Float[Tensor, "*shape"], name: str) -> tuple[float, int]:
    """Return max |x| and its place in the flattened values.

    Raises:
        SparqError: an element is not finite, as when float16 overflows.
    """
    norm, place = values.abs().flatten().max(dim=0)
    if not torch.isfinite(norm):
        raise SparqError(f"{name} has an element that is {norm.item()}: run the model in float32 or bfloat16")
    return norm.item(), int(place.item())
