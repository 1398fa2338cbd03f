"""How long the values of sinks are beside those of other tokens."""

import operator
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ValueNorms:
    """Sums of |v|, the Euclidean norm of the value that a head reads from a token, to be added up.

    A head that does nothing puts its attention on a token whose value is near zero, so |v| at sinks is small where
    sinks serve that end (Guo et al. 2024; Gu et al. 2025). Query heads that share a value count it once each.
    Sequences of one token count nowhere, since they have no choice of keys.

    Attributes:
        num_first: pairs of a head and a first token.
        first: sum of their |v|.
        num_sinks: pairs of a head and a sink of it, see `attention_statistics.sink_tokens`; the first token may be one.
        sinks: sum of their |v|.
        num_others: pairs of a head and a token that is neither.
        others: sum of their |v|.
    """

    num_first: int = 0
    first: float = 0.0
    num_sinks: int = 0
    sinks: float = 0.0
    num_others: int = 0
    others: float = 0.0

    @classmethod
    def of(cls, sinks: Bool[Tensor, "heads keys"], values: Float[Tensor, "heads keys head_dim"]) -> "ValueNorms":
        """Return the sums of one sequence without padding, all heads of one layer."""
        num_heads, num_keys = sinks.shape
        if num_keys == 1:
            return cls()
        norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)  # heads keys
        others = ~sinks
        others[:, 0] = False
        return cls(
            num_first=num_heads,
            first=norms[:, 0].sum().item(),
            num_sinks=int(sinks.sum()),
            sinks=norms[sinks].sum().item(),
            num_others=int(others.sum()),
            others=norms[others].sum().item(),
        )

    def __add__(self, other: "ValueNorms") -> "ValueNorms":
        names = self.__dataclass_fields__
        return ValueNorms(**dict(zip(names, map(operator.add, astuple(self), astuple(other)), strict=True)))

    @property
    def mean_first(self) -> float | None:
        """Mean |v| of first tokens."""
        return self.first / self.num_first if self.num_first else None

    @property
    def mean_sinks(self) -> float | None:
        """Mean |v| of sinks; None if there are none."""
        return self.sinks / self.num_sinks if self.num_sinks else None

    @property
    def mean_others(self) -> float | None:
        """Mean |v| of all other tokens; None if there are none."""
        return self.others / self.num_others if self.num_others else None
