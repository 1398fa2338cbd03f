"""A small generator for CPUs: ConvNeXt blocks that shape pulses and noise in the spectrum.

As in Vocos (Siuzdak 2023, arXiv 2306.00814) the blocks run at the rate of frames, and an inverse Fourier transform
makes the samples. Vocos predicts the whole spectrum, phase included, which takes long adversarial training. Here the
spectrum is that of a source, as in neural source-filter models (Wang et al. 2019, arXiv 1904.12088) and DDSP (Engel et
al. 2020). The network predicts pitch and two filters,

    Y = exp(a + i b) STFT(pulses at the pitch) + exp(c) STFT(noise),

with a, b, c for each bin and spectral frame. Phases are coherent from the first update on, so that losses on magnitudes
alone give clear speech after an hour on one core.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from sparq.vocoder.config import FRAME_HOP, LightConfig
from sparq.vocoder.excitation import frame_starts, noise, pulses
from sparq.vocoder.pitch import MAX_HZ, MIN_HZ

REFERENCE_HZ = 150.0
_LOUDEST = 6.0
_QUIET_START = -3.0


class Controls(NamedTuple):
    """What the network says of each frame.

    Attributes:
        hertz: pitch.
        filters: a, b and c of the formula, for each spectral frame.
    """

    hertz: Float[Tensor, "batch frames"]
    filters: Float[Tensor, "batch 3 spectral_frames bins"]


class Block(nn.Module):
    """ConvNeXt block in one dimension (Liu et al. 2022): depthwise convolution, norm, two linear layers, residual."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, hidden: Float[Tensor, "batch width frames"]) -> Float[Tensor, "batch width frames"]:
        """Return the input plus what the block adds."""
        inner = self.norm(self.depthwise(hidden).transpose(1, 2))  # batch frames width
        inner = self.contract(nn.functional.gelu(self.expand(inner))) * self.scale
        added: Tensor = inner.transpose(1, 2)
        return hidden + added


class LightGenerator(nn.Module):
    """Units and a speaker vector to samples; see the module's text."""

    window: Tensor

    def __init__(self, config: LightConfig, num_units: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.units = nn.Embedding(num_units, width)
        self.speaker = nn.Linear(config.speaker_dim, width)
        self.enter = nn.Conv1d(width, width, config.kernel, padding=config.kernel // 2)
        self.blocks = nn.ModuleList(
            Block(width, config.expansion * width, config.kernel) for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.pitch = nn.Linear(width, 1)
        self.num_bins = config.fft_size // 2 + 1
        self.per_frame = FRAME_HOP // config.fft_hop
        self.filters = nn.Linear(width, self.per_frame * 3 * self.num_bins)
        with torch.no_grad():
            self.filters.weight.mul_(0.1)
            bias = self.filters.bias.view(self.per_frame, 3, self.num_bins)
            bias.fill_(_QUIET_START)
            bias[:, 1] = 0
        self.register_buffer("window", torch.hann_window(config.fft_size), persistent=False)

    @property
    def network_context(self) -> int:
        """Frames on each side that the controls of a frame depend on."""
        return (self.config.num_blocks + 1) * (self.config.kernel // 2)

    @property
    def render_context(self) -> int:
        """Frames of controls on each side that a frame's samples depend on.

        A sample lies in windows that reach up to `fft_size` - 1 samples to each side of it, and the pitch at the center
        of a frame counts up to the centers beside it.
        """
        return -(-(self.config.fft_size - 1 + FRAME_HOP // 2) // FRAME_HOP)

    def controls(self, units: Int64[Tensor, "batch frames"], speaker: Float[Tensor, "batch speaker_dim"]) -> Controls:
        """Predict pitch and filters of each frame."""
        hidden = self.units(units) + self.speaker(speaker)[:, None]
        hidden = self.enter(hidden.transpose(1, 2))  # batch width frames
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden.transpose(1, 2))
        hertz = (self.pitch(hidden)[..., 0].float().exp() * REFERENCE_HZ).clamp(MIN_HZ, MAX_HZ)
        batch, frames = units.shape
        filters = self.filters(hidden).float().view(batch, frames * self.per_frame, 3, self.num_bins)
        return Controls(hertz, filters.transpose(1, 2))

    def render(
        self, controls: Controls, *, starts: Float64[Tensor, "batch frames"], first: Int64[Tensor, "batch"]
    ) -> Float[Tensor, "batch samples"]:
        """Make samples of controls.

        Args:
            controls: of consecutive frames.
            starts: phase of the pulses, in cycles, where each frame begins.
            first: number of the first frame on the tape of noise.
        """
        pulse = self._spectrum(pulses(controls.hertz, starts))
        hiss = self._spectrum(noise(first, controls.hertz.shape[1]))
        log_size, angle, log_noise = controls.filters.unbind(dim=1)
        shaped = torch.polar(log_size.clamp(max=_LOUDEST).exp(), angle) * pulse
        shaped = shaped + log_noise.clamp(max=_LOUDEST).exp() * hiss
        return self._samples(shaped)

    def forward(
        self, units: Int64[Tensor, "batch frames"], speaker: Float[Tensor, "batch speaker_dim"]
    ) -> Float[Tensor, "batch samples"]:
        """Return 320 samples for each unit."""
        controls = self.controls(units, speaker)
        zeros = torch.zeros(len(units), device=units.device)
        return self.render(controls, starts=frame_starts(controls.hertz, zeros.double()), first=zeros.long())

    def _spectrum(self, samples: Float[Tensor, "batch samples"]) -> Tensor:
        frames = nn.functional.pad(samples, (self._margin, self._margin))
        frames = frames.unfold(1, self.config.fft_size, self.config.fft_hop)  # batch spectral_frames fft_size
        spectrum: Tensor = torch.fft.rfft(frames * self.window)
        return spectrum

    def _samples(self, spectrum: Tensor) -> Float[Tensor, "batch samples"]:
        frames = torch.fft.irfft(spectrum, self.config.fft_size) * self.window
        weights = self.window.square().expand(1, frames.shape[1], -1)
        samples: Tensor = self._overlap_add(frames) / self._overlap_add(weights)
        return samples

    def _overlap_add(self, frames: Float[Tensor, "batch spectral_frames fft_size"]) -> Float[Tensor, "batch samples"]:
        size, hop = self.config.fft_size, self.config.fft_hop
        length = (frames.shape[1] - 1) * hop + size
        total = nn.functional.fold(frames.transpose(1, 2), (1, length), (1, size), stride=(1, hop))
        return total[:, 0, 0, self._margin : length - self._margin]

    @property
    def _margin(self) -> int:
        return (self.config.fft_size - self.config.fft_hop) // 2
