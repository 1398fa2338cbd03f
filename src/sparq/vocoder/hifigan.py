"""Unit HiFi-GAN (Kong et al. 2020, arXiv 2010.05646; on units: Polyak et al. 2021), as in SpARQ, appendix E.3.

Embeddings of units, with the projected speaker vector beside them, are upsampled by transposed convolutions to one
sample in 1/16000 s; residual blocks of dilated convolutions follow each of them, and their mean goes on.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sparq.vocoder.config import FRAME_HOP, HifiGanConfig

_SLOPE = 0.1
_EDGE_KERNEL = 7
_SPREAD = 0.01


class ResidualBlock(nn.Module):
    """HiFi-GAN's residual block of type 1: for each dilation d, x + conv(1)(lrelu(conv(d)(lrelu(x))))."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(_conv(channels, channels, kernel, dilation) for dilation in dilations)
        self.plain = nn.ModuleList(_conv(channels, channels, kernel, 1) for _ in dilations)

    def forward(self, hidden: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch channels samples"]:
        """Return the input plus what each pair of convolutions adds."""
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            inner = dilated(nn.functional.leaky_relu(hidden, _SLOPE))
            hidden = hidden + plain(nn.functional.leaky_relu(inner, _SLOPE))
        return hidden


class HifiGanGenerator(nn.Module):
    """Units and a speaker vector to samples."""

    def __init__(self, config: HifiGanConfig, num_units: int) -> None:
        super().__init__()
        self.config = config
        self.units = nn.Embedding(num_units, config.unit_dim)
        self.speaker = nn.Linear(config.speaker_dim, config.unit_dim)
        self.enter = _conv(2 * config.unit_dim, config.channels, _EDGE_KERNEL, 1)
        self.upsample = nn.ModuleList()
        self.residual = nn.ModuleList()
        channels = config.channels
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            transposed = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2)
            nn.init.normal_(transposed.weight, 0.0, _SPREAD)
            self.upsample.append(weight_norm(transposed))
            channels //= 2
            self.residual.append(
                nn.ModuleList(ResidualBlock(channels, k, config.resblock_dilations) for k in config.resblock_kernels)
            )
        self.leave = _conv(channels, 1, _EDGE_KERNEL, 1)

    @property
    def network_context(self) -> int:
        """Frames on each side that a frame's samples depend on.

        The interval of samples [a, b] of one frame is followed from the output back. A convolution that reaches r
        samples makes it [a - r, b + r]; a transposed one of stride s, kernel k and padding p takes it to
        [ceil((a + p - k + 1) / s), floor((b + p) / s)].
        """
        config = self.config
        reach = max(
            sum((kernel - 1) // 2 * (dilation + 1) for dilation in config.resblock_dilations)
            for kernel in config.resblock_kernels
        )
        edge = _EDGE_KERNEL // 2
        first, last = -edge, FRAME_HOP - 1 + edge
        for rate, kernel in reversed(list(zip(config.upsample_rates, config.upsample_kernels, strict=True))):
            padding = (kernel - rate) // 2
            first, last = first - reach + padding - kernel + 1, last + reach + padding
            first, last = -(-first // rate), last // rate
        return max(edge - first, last + edge)

    def forward(
        self, units: Int64[Tensor, "batch frames"], speaker: Float[Tensor, "batch speaker_dim"]
    ) -> Float[Tensor, "batch samples"]:
        """Return 320 samples for each unit."""
        who = self.speaker(speaker)[:, None].expand(-1, units.shape[1], -1)
        hidden = torch.cat([self.units(units), who], dim=-1).transpose(1, 2)  # batch 2*unit_dim frames
        hidden = self.enter(hidden)
        for upsample, blocks in zip(self.upsample, self.residual, strict=True):
            hidden = upsample(nn.functional.leaky_relu(hidden, _SLOPE))
            assert isinstance(blocks, nn.ModuleList)
            hidden = torch.stack([block(hidden) for block in blocks]).mean(dim=0)
        samples: Tensor = self.leave(nn.functional.leaky_relu(hidden, _SLOPE)).float().tanh()[:, 0]
        assert samples.shape[1] == units.shape[1] * FRAME_HOP
        return samples


def _conv(inputs: int, outputs: int, kernel: int, dilation: int) -> nn.Module:
    conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=(kernel - 1) // 2 * dilation)
    if inputs == outputs:
        nn.init.normal_(conv.weight, 0.0, _SPREAD)
    normed: nn.Module = weight_norm(conv)
    return normed
