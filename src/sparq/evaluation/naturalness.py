"""How natural speech sounds, as a predicted mean opinion score: UTMOS, where its package is installed."""

from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
import torch
from jaxtyping import Float32

from sparq.errors import SparqError
from sparq.types import SAMPLE_RATE

Naturalness = Callable[[Sequence[Float32[np.ndarray, "_samples"]]], list[float]]
"""Gives each waveform's opinion score, from 1 (bad) to 5 (excellent)."""


def load_utmos() -> Naturalness | None:
    """Return UTMOS (Saeki et al. 2022, arXiv 2204.02152), or None if the package `utmos` is not installed.

    The package fetches its weights itself, when it is first used. They were trained on ratings of English and Chinese
    synthetic speech of whole sentences: what it says of a single word means little.

    Raises:
        SparqError: it is installed, but what it needs is not.
    """
    try:
        model = import_module("utmos").Score()
    except ModuleNotFoundError as error:
        if error.name == "utmos":
            return None
        raise SparqError(
            f"the package utmos needs {error.name}, which is not installed: install or remove it"
        ) from error

    def score(waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[float]:
        return [float(model.calculate_wav(torch.from_numpy(waveform)[None], SAMPLE_RATE)) for waveform in waveforms]

    return score
