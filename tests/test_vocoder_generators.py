"""Generators: parameter counts by closed form, receptive fields by gradient, streams equal to wholes."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from sparq.errors import SparqError
from sparq.vocoder.config import FRAME_HOP, GeneratorConfig, HifiGanConfig, LightConfig
from sparq.vocoder.discriminators import HifiGanDiscriminators, PeriodDiscriminators, num_parameters
from sparq.vocoder.hifigan import HifiGanGenerator
from sparq.vocoder.light import LightGenerator
from sparq.vocoder.streaming import DurationStream, FrameStream, stream_speech
from sparq.vocoder.voice import VocoderNetworks, build_networks

TINY_LIGHT = LightConfig(speaker_dim=8, width=12, expansion=2, num_blocks=2, kernel=3)
TINY_HIFIGAN = HifiGanConfig(speaker_dim=8, unit_dim=6, channels=64, resblock_kernels=(3, 5), resblock_dilations=(1, 3))
TINY = [pytest.param(TINY_LIGHT, id="light"), pytest.param(TINY_HIFIGAN, id="hifigan")]


def _networks(config: GeneratorConfig, num_units: int = 10) -> VocoderNetworks:
    networks = build_networks(config, num_units=num_units, seed=0).eval().requires_grad_(False)
    # Weights as they start make almost silent or constant filters; louder ones let errors show.
    for parameter in networks.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return networks


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    """Weight, its norm for each output channel, bias."""
    return outputs * inputs * kernel + outputs + outputs


def _hifigan_count(config: HifiGanConfig, num_units: int) -> int:
    total = num_units * config.unit_dim + (config.speaker_dim + 1) * config.unit_dim
    channels = config.channels
    total += _conv(2 * config.unit_dim, channels, 7)
    for kernel in config.upsample_kernels:
        # A transposed convolution's weight is [in, out, kernel] and its norm is one for each input channel.
        total += channels * (channels // 2) * kernel + channels + channels // 2
        channels //= 2
        for size in config.resblock_kernels:
            total += 2 * len(config.resblock_dilations) * _conv(channels, channels, size)
    return total + _conv(channels, 1, 7)


def _light_count(config: LightConfig, num_units: int) -> int:
    width, hidden = config.width, config.expansion * config.width
    block = width * config.kernel + width + 2 * width + (width + 1) * hidden + (hidden + 1) * width + width
    bins = config.fft_size // 2 + 1
    return (
        num_units * width
        + (config.speaker_dim + 1) * width
        + width * width * config.kernel + width
        + config.num_blocks * block
        + 2 * width
        + width + 1
        + (width + 1) * (FRAME_HOP // config.fft_hop) * 3 * bins
    )  # fmt: skip


def test_the_papers_generator_has_the_parameters_that_its_settings_imply() -> None:
    config = HifiGanConfig()
    with torch.device("meta"):
        generator = HifiGanGenerator(config, 200)
    # E.3: 200 embeddings of 128, 512 channels, factors 5 4 4 2 2 with kernels 11 8 8 4 4, residual blocks of type 1.
    assert num_parameters(generator) == _hifigan_count(config, 200) == 13_775_490
    assert generator.units.weight.shape == (200, 128)
    assert [m.stride[0] for m in generator.modules() if isinstance(m, nn.ConvTranspose1d)] == [5, 4, 4, 2, 2]
    assert [m.kernel_size[0] for m in generator.modules() if isinstance(m, nn.ConvTranspose1d)] == [11, 8, 8, 4, 4]


def test_the_light_generator_is_small() -> None:
    generator = LightGenerator(LightConfig(), 100)
    assert num_parameters(generator) == _light_count(LightConfig(), 100)
    assert num_parameters(generator) < 4_000_000
    tiny = LightGenerator(TINY_LIGHT, 7)
    assert num_parameters(tiny) == _light_count(TINY_LIGHT, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample_rates": (5, 4, 4, 2, 3)}, "multiply to 480"),
        ({"upsample_kernels": (11, 8, 8, 4)}, "4 upsample_kernels for 5"),
        ({"upsample_kernels": (10, 8, 8, 4, 4)}, "upsampling by 5 with kernel 10"),
        ({"channels": 500}, "channels 500 cannot be halved 5 times"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        HifiGanConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fft_hop": 90}, "fft_hop 90 does not divide"),
        ({"fft_size": 400}, "fft_size 400 does not fit"),
        ({"kernel": 4}, "kernel 4 has no middle"),
    ],
)
def test_impossible_light_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(SparqError, match=message):
        LightConfig(**change)


@pytest.mark.parametrize("config", TINY)
def test_a_unit_becomes_320_samples(config: GeneratorConfig) -> None:
    samples = _networks(config).generator(torch.randint(0, 10, (2, 9)), torch.randn(2, 8))
    assert samples.shape == (2, 9 * FRAME_HOP)
    assert samples.isfinite().all()


def _influence(generator: LightGenerator | HifiGanGenerator) -> list[int]:
    """Return the frames whose units have a gradient on the samples of frame 40."""
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.requires_grad_())
        return output

    handle = generator.units.register_forward_hook(keep)
    samples = generator(torch.randint(0, 10, (1, 81)), torch.randn(1, 8))
    handle.remove()
    (gradient,) = torch.autograd.grad(samples[0, 40 * FRAME_HOP : 41 * FRAME_HOP].abs().sum(), embedded)
    frames: list[int] = gradient[0].abs().sum(dim=1).nonzero()[:, 0].tolist()
    return frames


def test_the_context_of_hifigan_is_its_receptive_field() -> None:
    generator = _networks(TINY_HIFIGAN).generator
    for parameter in generator.parameters():
        parameter.abs_()  # so that nothing cancels
    context = FrameStream(generator, torch.zeros(8)).lookahead
    assert _influence(generator) == list(range(40 - context, 40 + context + 1))


def test_the_context_of_the_light_generator_is_its_receptive_field() -> None:
    generator = _networks(TINY_LIGHT).generator
    assert isinstance(generator, LightGenerator)
    context = FrameStream(generator, torch.zeros(8)).lookahead
    # The phase is a sum over all that was before; ahead there is nothing beyond the context.
    assert _influence(generator) == list(range(40 + context + 1))
    generator.pitch.weight.zero_()
    # Of filters, only the frames beside it are in the windows of a frame.
    near = generator.network_context + 1
    assert near < context
    assert _influence(generator) == list(range(40 - near, 40 + near + 1))


def _portions(units: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(units), size):
        yield units[first : first + size]


@pytest.mark.parametrize("chunk", [1, 7, 25])
@pytest.mark.parametrize("num_frames", [1, 5, 93])
@pytest.mark.parametrize("config", TINY)
def test_a_stream_equals_the_whole_everywhere(config: GeneratorConfig, num_frames: int, chunk: int) -> None:
    networks = _networks(config)
    units = torch.randint(0, 10, (num_frames,)).tolist()
    speaker = torch.randn(8)
    whole = networks.generator(torch.tensor([units]), speaker[None])[0].numpy()
    frames = FrameStream(networks.generator, speaker, chunk=chunk)
    pieces = list(stream_speech(_portions(units, 3), frames, None))
    made = np.concatenate(pieces)
    assert made.shape == whole.shape
    assert np.abs(whole).max() > 1e-3
    # Rounding in the last bit of the pitch moves pulses by a millionth of a cycle, which 80 harmonics make visible.
    tolerance = 3e-3 if isinstance(config, LightConfig) else 1e-5
    assert np.abs(made - whole).max() < tolerance * np.abs(whole).max()


@pytest.mark.parametrize("config", TINY)
def test_the_first_piece_comes_before_the_last_unit(config: GeneratorConfig) -> None:
    networks = _networks(config)
    frames = FrameStream(networks.generator, torch.randn(8), chunk=5)
    taken = 0

    def units() -> Iterator[list[int]]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield [1]

    next(stream_speech(units(), frames, None))
    assert taken == 5 + frames.lookahead


def test_durations_in_a_stream_are_those_of_the_whole() -> None:
    networks = _networks(TINY_LIGHT)
    speaker = torch.randn(8)
    units = torch.randint(0, 10, (60,)).tolist()
    whole = DurationStream(networks.duration, speaker)
    expected = whole.push(units) + whole.finish()
    stream = DurationStream(networks.duration, speaker)
    frames = [frame for portion in _portions(units, 4) for frame in stream.push(portion)] + stream.finish()
    assert frames == expected
    assert len(frames) > len(units)


def test_the_critics_of_hifigan() -> None:
    with torch.device("meta"):
        critics = HifiGanDiscriminators()
        judged = critics(torch.randn(2, 8192))
    assert len(judged.scores) == 5 + 3
    assert [score.shape[0] for score in judged.scores] == [2] * 8
    # One stack of periods: 1 -> 32 -> 128 -> 512 -> 1024 -> 1024 by kernels of 5, then 3; norms and biases.
    widths = [1, 32, 128, 512, 1024, 1024]
    layers = [b * a * 5 + 2 * b for a, b in itertools.pairwise(widths)]
    with torch.device("meta"):
        assert num_parameters(PeriodDiscriminators()) == 5 * (sum(layers) + 1024 * 3 + 2)
