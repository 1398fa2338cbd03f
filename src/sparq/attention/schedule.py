"""Function-preserving conversion: from the pretrained softmax to one with a sink without a jump."""

import math

import torch
from torch import nn

from sparq.attention.module import OutlierFreeAttention
from sparq.errors import SparqError

SCHEDULED = ("softmax1", "learned_sink")
"""Normalizations whose sink has a weight that can rise from 0."""


class SinkSchedule:
    """Raises the weight w of the sink from 0 to 1 while a model adapts.

    The probabilities are exp(s) / (w exp(b) + sum(exp(s))): at w = 0 the pretrained softmax, to the last bit, at w = 1
    `softmax1`, where b is 0, or `learned_sink`. The weight rises linearly, w = update / updates; what is added to b
    goes from -inf to 0. With b = 0 a row loses the mass w / (w + sum(exp(s))), so no update takes more than
    1 / (updates * sum(exp(s))) of it. At w = 0 a learned b has no gradient.

    Args:
        model: a converted model, or anything that holds one; every layer's normalization is one of `SCHEDULED`.
        updates: after so many the model is what it was converted to.

    Raises:
        SparqError: nothing is converted, a layer has another normalization, or `updates` is below 1.
    """

    def __init__(self, model: nn.Module, *, updates: int) -> None:
        if updates < 1:
            raise SparqError(f"the sink's schedule has {updates} updates: it needs at least 1")
        self._layers = [module for module in model.modules() if isinstance(module, OutlierFreeAttention)]
        found = sorted({layer.spec.normalization for layer in self._layers})
        if found not in [[name] for name in SCHEDULED]:
            there = ", ".join(found) or "nothing converted"
            raise SparqError(f"the sink's schedule ends at {' or '.join(SCHEDULED)}, but the model has {there}")
        self._model, self.updates = model, updates

    def log_weight(self, update: int) -> float:
        """Return log(w) after so many updates."""
        weight = min(1.0, update / self.updates)
        return math.log(weight) if weight > 0 else -math.inf

    def set(self, update: int) -> None:
        """Give every layer's sink the weight that belongs to a number of finished updates.

        While the schedule lasts log(w) is a buffer of each layer, saved with the model; at its end there is none.
        """
        log_weight = self.log_weight(update)
        device = next(self._model.parameters()).device
        for layer in self._layers:
            layer.log_weight = None if log_weight == 0 else torch.full((layer.heads,), log_weight, device=device)
