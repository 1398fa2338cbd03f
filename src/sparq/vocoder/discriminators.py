"""Critics of waveforms: each returns its score and the features inside, for matching."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sparq.vocoder.spectra import magnitudes

_SLOPE = 0.1


class Judgment(NamedTuple):
    """Scores near 1 for real speech and 0 for made one, and the features of each layer, by discriminator."""

    scores: list[Tensor]
    features: list[list[Tensor]]


class _Stack(nn.Module):
    """Convolutions with leaky rectifiers; the last one gives the score."""

    def __init__(self, layers: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.last = last

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            hidden = nn.functional.leaky_relu(layer(hidden), _SLOPE)
            features.append(hidden)
        hidden = self.last(hidden)
        return hidden, [*features, hidden]


class PeriodDiscriminators(nn.Module):
    """HiFi-GAN's multi-period discriminator (Kong et al. 2020, section 2.3).

    For each period p the waveform is folded into rows of p samples, and 2-D convolutions run down the columns.
    """

    periods = (2, 3, 5, 7, 11)

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(self._stack() for _ in self.periods)

    @staticmethod
    def _stack() -> _Stack:
        widths = (1, 32, 128, 512, 1024)
        layers: list[nn.Module] = [
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0))) for a, b in itertools.pairwise(widths)
        ]
        layers.append(weight_norm(nn.Conv2d(1024, 1024, (5, 1), padding=(2, 0))))
        return _Stack(layers, weight_norm(nn.Conv2d(1024, 1, (3, 1), padding=(1, 0))))

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Judgment:
        """Judge waveforms."""
        scores, features = [], []
        for period, stack in zip(self.periods, self.stacks, strict=True):
            rest = -samples.shape[1] % period
            padded = nn.functional.pad(samples[:, None], (0, rest), mode="reflect")
            folded = padded.reshape(len(samples), 1, -1, period)  # batch 1 rows period
            score, inside = stack(folded)
            scores.append(score)
            features.append(inside)
        return Judgment(scores, features)


class ScaleDiscriminators(nn.Module):
    """HiFi-GAN's multi-scale discriminator: grouped convolutions on the waveform and its averages over 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList([self._stack(spectral_norm), self._stack(weight_norm), self._stack(weight_norm)])
        self.halve = nn.AvgPool1d(4, 2, padding=2)

    @staticmethod
    def _stack(norm: Callable[[nn.Module], nn.Module]) -> _Stack:
        layers: list[nn.Module] = [
            norm(nn.Conv1d(1, 128, 15, padding=7)),
            norm(nn.Conv1d(128, 128, 41, 2, groups=4, padding=20)),
            norm(nn.Conv1d(128, 256, 41, 2, groups=16, padding=20)),
            norm(nn.Conv1d(256, 512, 41, 4, groups=16, padding=20)),
            norm(nn.Conv1d(512, 1024, 41, 4, groups=16, padding=20)),
            norm(nn.Conv1d(1024, 1024, 41, groups=16, padding=20)),
            norm(nn.Conv1d(1024, 1024, 5, padding=2)),
        ]
        return _Stack(layers, norm(nn.Conv1d(1024, 1, 3, padding=1)))

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Judgment:
        """Judge waveforms."""
        scores, features = [], []
        scaled = samples[:, None]
        for index, stack in enumerate(self.stacks):
            if index:
                scaled = self.halve(scaled)
            score, inside = stack(scaled)
            scores.append(score)
            features.append(inside)
        return Judgment(scores, features)


class HifiGanDiscriminators(nn.Module):
    """Both of HiFi-GAN's."""

    def __init__(self) -> None:
        super().__init__()
        self.periods = PeriodDiscriminators()
        self.scales = ScaleDiscriminators()

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Judgment:
        """Judge waveforms."""
        first, second = self.periods(samples), self.scales(samples)
        return Judgment(first.scores + second.scores, first.features + second.features)


class SpectrogramDiscriminators(nn.Module):
    """A small critic of log spectrograms at three resolutions (as UnivNet's, Jang et al. 2021), for CPUs."""

    resolutions = ((320, 80), (640, 160), (1280, 320))
    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(self._stack() for _ in self.resolutions)

    def _stack(self) -> _Stack:
        width = self.width
        layers: list[nn.Module] = [weight_norm(nn.Conv2d(1, width, (7, 5), (2, 1), padding=(3, 2)))]
        layers += [weight_norm(nn.Conv2d(width, width, (5, 3), (2, 1), padding=(2, 1))) for _ in range(3)]
        layers.append(weight_norm(nn.Conv2d(width, width, 3, padding=1)))
        return _Stack(layers, weight_norm(nn.Conv2d(width, 1, 3, padding=1)))

    def forward(self, samples: Float[Tensor, "batch samples"]) -> Judgment:
        """Judge waveforms."""
        scores, features = [], []
        for (size, hop), stack in zip(self.resolutions, self.stacks, strict=True):
            spectrum = magnitudes(samples, size=size, hop=hop).clamp(min=1e-4).log()
            score, inside = stack(spectrum[:, None])  # batch 1 bins frames
            scores.append(score)
            features.append(inside)
        return Judgment(scores, features)


def num_parameters(module: nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
