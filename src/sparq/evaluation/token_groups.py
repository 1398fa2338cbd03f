"""Outliers of text, speech and boundary tokens apart."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparq.evaluation.moments import Moments


@dataclass(frozen=True, kw_only=True)
class GroupOutliers:
    """The tokens of one group.

    Attributes:
        num_tokens: how many there were.
        max_inf_norm: max |x| over their outputs of all blocks.
        mean_kurtosis: kurtosis of all elements of their outputs of one block, averaged over blocks; NaN without tokens.
        attention_share: share of all attention that goes to them, over all layers, heads and rows with more than one
            key. It is divided by the mass that is spent.
    """

    num_tokens: int
    max_inf_norm: float
    mean_kurtosis: float
    attention_share: float


class GroupSums:
    """Running sums for every group; a token belongs to a group by its id.

    Args:
        members: for each group, which ids of the vocabulary belong to it.
        num_layers: number of decoder blocks.
    """

    def __init__(self, members: Mapping[str, Bool[Tensor, " vocabulary"]], num_layers: int) -> None:
        self._members = dict(members)
        self._tokens = dict.fromkeys(members, 0)
        self._largest = dict.fromkeys(members, 0.0)
        self._moments: dict[str, list[Moments | None]] = {name: [None] * num_layers for name in members}
        self._received = dict.fromkeys(members, 0.0)
        self._spent = 0.0

    def add_hidden(self, layer: int, ids: Int[Tensor, " tokens"], hidden: Float[Tensor, "tokens width"]) -> None:
        """Count the outputs of a block, of one sequence without its padding."""
        for name, member in self._members.items():
            own = hidden[member[ids]]
            if layer == 0:
                self._tokens[name] += len(own)
            if len(own):
                self._largest[name] = max(self._largest[name], own.abs().amax().item())
                moments, before = Moments.of(own), self._moments[name][layer]
                self._moments[name][layer] = moments if before is None else before.merge(moments)

    def add_attention(self, ids: Int[Tensor, " tokens"], probabilities: Float[Tensor, "heads tokens tokens"]) -> None:
        """Count the attention of one layer, of one sequence without its padding."""
        if not self._members:
            return
        received = probabilities[:, 1:].double().sum(dim=(0, 1))
        self._spent += received.sum().item()
        for name, member in self._members.items():
            self._received[name] += received[member[ids]].sum().item()

    def report(self) -> dict[str, GroupOutliers]:
        """Return what was found."""
        found = {}
        for name, moments in self._moments.items():
            kurtoses = [m.kurtosis if m is not None else torch.nan for m in moments]
            found[name] = GroupOutliers(
                num_tokens=self._tokens[name],
                max_inf_norm=self._largest[name],
                mean_kurtosis=sum(kurtoses) / len(kurtoses),
                attention_share=self._received[name] / self._spent if self._spent > 0 else 0.0,
            )
        return found
