"""Shapes of both generators."""

from dataclasses import dataclass

from sparq.errors import SparqError

FRAME_HOP = 320
"""Samples per unit frame: 20 ms at 16 kHz, 50 units a second."""


@dataclass(frozen=True, kw_only=True)
class LightConfig:
    """The small generator for CPUs; see `sparq.vocoder.light`.

    Attributes:
        speaker_dim: length of a speaker vector.
        width: channels of the blocks.
        expansion: the blocks' hidden channels over `width`.
        num_blocks: ConvNeXt blocks.
        kernel: frames that a block's convolution sees.
        fft_size: samples of a spectral frame's window.
        fft_hop: samples between spectral frames; divides 320.
    """

    speaker_dim: int = 256
    width: int = 192
    expansion: int = 3
    num_blocks: int = 8
    kernel: int = 7
    fft_size: int = 480
    fft_hop: int = 80

    def __post_init__(self) -> None:
        if FRAME_HOP % self.fft_hop:
            raise SparqError(f"fft_hop {self.fft_hop} does not divide the {FRAME_HOP} samples of a unit: take 80")
        if self.fft_size % (2 * self.fft_hop) or self.fft_size < 4 * self.fft_hop:
            raise SparqError(
                f"fft_size {self.fft_size} does not fit fft_hop {self.fft_hop}: take an even multiple of it, 4 or more"
            )
        if self.kernel % 2 == 0:
            raise SparqError(f"kernel {self.kernel} has no middle: take an odd number")


@dataclass(frozen=True, kw_only=True)
class HifiGanConfig:
    """The unit HiFi-GAN of SpARQ, appendix E.3; see `sparq.vocoder.hifigan`.

    Attributes:
        speaker_dim: length of a speaker vector.
        unit_dim: length of a unit's embedding.
        channels: channels before the first upsampling; each upsampling halves them.
        upsample_rates: factors whose product is 320.
        upsample_kernels: kernels of the transposed convolutions.
        resblock_kernels: kernels of the residual blocks behind each upsampling.
        resblock_dilations: dilations within each residual block (type 1).
    """

    speaker_dim: int = 256
    unit_dim: int = 128
    channels: int = 512
    upsample_rates: tuple[int, ...] = (5, 4, 4, 2, 2)
    upsample_kernels: tuple[int, ...] = (11, 8, 8, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[int, ...] = (1, 3, 5)

    def __post_init__(self) -> None:
        product = 1
        for rate in self.upsample_rates:
            product *= rate
        if product != FRAME_HOP:
            raise SparqError(f"upsample_rates {self.upsample_rates} multiply to {product}: they must make {FRAME_HOP}")
        if len(self.upsample_kernels) != len(self.upsample_rates):
            raise SparqError(
                f"{len(self.upsample_kernels)} upsample_kernels for {len(self.upsample_rates)} rates: give as many"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise SparqError(
                    f"upsampling by {rate} with kernel {kernel}: take a kernel of {rate} plus an even number"
                )
        if self.channels % 2 ** len(self.upsample_rates):
            raise SparqError(f"channels {self.channels} cannot be halved {len(self.upsample_rates)} times: take 512")


GeneratorConfig = LightConfig | HifiGanConfig
