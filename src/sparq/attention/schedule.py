"""Function-preserving conversion: from the pretrained softmax to softmax1 without a jump."""

import math

import torch
from torch import nn

from sparq.attention.module import OutlierFreeAttention
from sparq.errors import SparqError


class SinkSchedule:
    """Raises the weight w of the sink from 0 to 1 while a model adapts.

    The probabilities are exp(s) / (w + sum(exp(s))): at w = 0 the pretrained softmax, to the last bit, at w = 1
    `softmax1`. The weight rises linearly, w = update / updates; as a logit the sink goes from -inf to 0. A row loses
    the mass w / (w + sum(exp(s))), so no update takes more than 1 / (updates * sum(exp(s))) of it.

    Args:
        model: a converted model, or anything that holds one; every layer's normalization is `softmax1`.
        updates: after so many the model is plain softmax1.

    Raises:
        SparqError: nothing is converted, a layer has another normalization, or `updates` is below 1.
    """

    def __init__(self, model: nn.Module, *, updates: int) -> None:
        if updates < 1:
            raise SparqError(f"the sink's schedule has {updates} updates: it needs at least 1")
        self._layers = [module for module in model.modules() if isinstance(module, OutlierFreeAttention)]
        found = sorted({layer.spec.normalization for layer in self._layers})
        if found != ["softmax1"]:
            there = ", ".join(found) or "nothing converted"
            raise SparqError(f"the sink's schedule ends at softmax1, but the model has {there}")
        self._model, self.updates = model, updates

    def logit(self, update: int) -> float:
        """Return the sink's logit b = log(w) after so many updates."""
        weight = min(1.0, update / self.updates)
        return math.log(weight) if weight > 0 else -math.inf

    def set(self, update: int) -> None:
        """Give every layer the sink that belongs to a number of finished updates.

        While the schedule lasts the sink is a buffer of each layer, saved with the model; at its end there is none.
        """
        logit = self.logit(update)
        device = next(self._model.parameters()).device
        for layer in self._layers:
            layer.sink = None if logit == 0 else torch.full((layer.heads,), logit, device=device)
