"""What an attention that computes with fewer bits asks of whoever rounds."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

Inputs = tuple[
    Float[Tensor, "batch heads queries head_dim"],
    Float[Tensor, "batch kv_heads keys head_dim"],
    Float[Tensor, "batch kv_heads keys head_dim"],
]
"""Queries, keys and values."""


class InnerQuantizer(Protocol):
    """Rounds what goes into the two products of an attention; what rounds, and how, `sparq.quantization` says."""

    @property
    def writes_out(self) -> bool:
        """Whether probabilities are rounded, which only attention that writes them out has."""

    def inputs(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
    ) -> Inputs:
        """Return queries, keys and values as the products see them, in their types."""

    def probabilities(
        self, probabilities: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Return the probabilities as the second product sees them."""
