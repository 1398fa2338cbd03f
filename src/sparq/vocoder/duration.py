"""How long each unit lasts, for units that were written without repetition."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

_WIDTH = 128
_KERNEL = 5
_LAYERS = 3
_LONGEST = 100.0  # frames, 2 s


class DurationPredictor(nn.Module):
    """Convolutions over a run of units that predict its duration, in frames, as the mean of a Poisson law plus 1.

    d_i = 1 + exp(g_i). A Poisson law keeps the mean, so that speech has its length; errors of the logarithm, as in
    FastSpeech 2, would make it shorter.
    """

    def __init__(self, num_units: int, speaker_dim: int) -> None:
        super().__init__()
        self.units = nn.Embedding(num_units, _WIDTH)
        self.speaker = nn.Linear(speaker_dim, _WIDTH)
        self.layers = nn.ModuleList(nn.Conv1d(_WIDTH, _WIDTH, _KERNEL, padding=_KERNEL // 2) for _ in range(_LAYERS))
        self.out = nn.Linear(_WIDTH, 1)

    @property
    def context(self) -> int:
        """Units on each side that a duration depends on."""
        return _LAYERS * (_KERNEL // 2)

    def forward(
        self,
        units: Int64[Tensor, "batch units"],
        speaker: Float[Tensor, "batch speaker_dim"],
        real: Bool[Tensor, "batch units"],
    ) -> Float[Tensor, "batch units"]:
        """Return log(d - 1); `real` is false in the padding."""
        hidden = (self.units(units) + self.speaker(speaker)[:, None]).transpose(1, 2)  # batch width units
        mask = real[:, None].to(hidden.dtype)
        for layer in self.layers:
            hidden = hidden + nn.functional.gelu(layer(hidden * mask))
        log_rate: Tensor = self.out(hidden.transpose(1, 2))[..., 0].float()
        return log_rate

    def frames(self, units: Int64[Tensor, "units"], speaker: Float[Tensor, "speaker_dim"]) -> Float[Tensor, "units"]:
        """Return the expected duration of each unit, in frames; between 1 and 100."""
        log_rate: Tensor = self(units[None], speaker[None], torch.ones_like(units, dtype=torch.bool)[None])[0]
        return (1 + log_rate.exp()).clamp(max=_LONGEST)


def duration_loss(
    log_rate: Float[Tensor, "batch units"], durations: Int64[Tensor, "batch units"], real: Bool[Tensor, "batch units"]
) -> Float[Tensor, ""]:
    """Return the mean negative log likelihood of d - 1 under the Poisson law, up to a constant."""
    likelihood = nn.functional.poisson_nll_loss(log_rate, (durations - 1).float(), log_input=True, reduction="none")
    return (likelihood * real).sum() / real.sum()


def whole_frames(lengths: Float[Tensor, "units"], *, before: float = 0.0) -> Int64[Tensor, "units"]:
    """Round durations so that the sum never is more than half a frame off.

    A unit ends at the rounded sum of all before and its own; as none is shorter than 1, none vanishes.

    Args:
        lengths: at least 1 each.
        before: sum of the unrounded durations of earlier units.
    """
    ends = torch.floor(before + lengths.double().cumsum(dim=0) + 0.5).long()
    start = torch.tensor([int(before + 0.5)])
    return torch.diff(ends, prepend=start)
