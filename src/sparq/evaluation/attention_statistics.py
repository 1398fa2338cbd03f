"""What the attention of one head does with its mass: how much it spends, and how much of that on sinks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SINK_THRESHOLD = 0.3
"""A token is a sink of a head that spends more than this share on it (the epsilon of Gu et al. 2025)."""


def sink_tokens(probabilities: Float[Tensor, "heads queries keys"]) -> Bool[Tensor, "heads keys"]:
    """Tell which keys are sinks of which heads, in the causal maps of one sequence without padding.

    A key's share is the sum of its column divided by the sum of all columns, over the rows with more than one key.
    The key is a sink of that head if its share exceeds `SINK_THRESHOLD`, so a head has three sinks at most, and
    halving all the probabilities (as `max_shift` may) hides none.
    """
    received = probabilities[:, 1:].sum(dim=1, dtype=torch.float64)
    return received > SINK_THRESHOLD * received.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class AttentionSums:
    """Sums over the rows (one query of one head each) of causal attention maps, to be added up.

    The first row of a sequence sees one key, so it has no choice and counts for the mass only.

    Attributes:
        num_rows: rows, first ones included.
        num_choices: rows with more than one key.
        mass: sum of all probabilities.
        choice_mass: sum of all probabilities, over rows with more than one key.
        first_token: sum of the probabilities of the first key, over rows with more than one key.
        sink: sum of the probabilities of sinks, over rows with more than one key.
        entropy: sum of the entropies in nats, over rows with more than one key.
    """

    num_rows: int = 0
    num_choices: int = 0
    mass: float = 0.0
    choice_mass: float = 0.0
    first_token: float = 0.0
    sink: float = 0.0
    entropy: float = 0.0

    @classmethod
    def of(cls, probabilities: Float[Tensor, "heads queries keys"]) -> "AttentionSums":
        """Return the sums of one sequence without padding, all heads of one layer.

        The entropy is that of the row divided by its mass; a row without any mass counts as 0.
        """
        num_heads, num_queries, num_keys = probabilities.shape
        assert num_queries == num_keys, "a map of a whole sequence is square"
        wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
        mass = wide.sum(dim=-1, dtype=torch.float64)  # heads queries
        if num_queries == 1:
            return cls(num_rows=num_heads, mass=mass.sum().item())
        choices, choice_mass = wide[:, 1:], mass[:, 1:]  # heads queries-1 keys, heads queries-1
        received = choices.sum(dim=1, dtype=torch.float64)  # heads keys
        sinks = sink_tokens(probabilities)
        # H(p / m) = log m - sum(p log p) / m
        plogp = torch.special.xlogy(choices, choices).sum(dim=-1, dtype=torch.float64)
        entropy = torch.where(choice_mass > 0, choice_mass.log() - plogp / choice_mass, 0.0)
        return cls(
            num_rows=num_heads * num_queries,
            num_choices=num_heads * (num_queries - 1),
            mass=mass.sum().item(),
            choice_mass=choice_mass.sum().item(),
            first_token=received[:, 0].sum().item(),
            sink=received[sinks].sum().item(),
            entropy=entropy.sum().item(),
        )

    def __add__(self, other: "AttentionSums") -> "AttentionSums":
        return AttentionSums(
            num_rows=self.num_rows + other.num_rows,
            num_choices=self.num_choices + other.num_choices,
            mass=self.mass + other.mass,
            choice_mass=self.choice_mass + other.choice_mass,
            first_token=self.first_token + other.first_token,
            sink=self.sink + other.sink,
            entropy=self.entropy + other.entropy,
        )
