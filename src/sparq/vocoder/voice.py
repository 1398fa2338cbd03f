"""The networks of a vocoder as one module."""

import copy

import torch
from torch import nn

from sparq.vocoder.config import GeneratorConfig, LightConfig
from sparq.vocoder.duration import DurationPredictor
from sparq.vocoder.hifigan import HifiGanGenerator
from sparq.vocoder.light import LightGenerator


class VocoderNetworks(nn.Module):
    """A generator and the predictor of durations.

    Args:
        config: shape of the generator.
        num_units: size of the unit alphabet.
    """

    def __init__(self, config: GeneratorConfig, num_units: int) -> None:
        super().__init__()
        self.config, self.num_units = config, num_units
        self.generator: LightGenerator | HifiGanGenerator = (
            LightGenerator(config, num_units)
            if isinstance(config, LightConfig)
            else HifiGanGenerator(config, num_units)
        )
        self.duration = DurationPredictor(num_units, config.speaker_dim)

    def copy(self) -> "VocoderNetworks":
        """Return networks of the same weights that do not learn."""
        return copy.deepcopy(self).eval().requires_grad_(False)


def build_networks(config: GeneratorConfig, *, num_units: int, seed: int) -> VocoderNetworks:
    """Return networks of random weights that the seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VocoderNetworks(config, num_units)
