"""A distance of what two sounds say: how far apart a speech encoder finds them, layer by layer."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sparq.errors import SparqError
from sparq.pretrained import resolve_model
from sparq.units.checkpoint import load_lower_part
from sparq.vocoder.spectra import power_bands

_FFT, _HOP = 400, 160
_RANGE = 8.0  # decades below a clip's loudest band


class ContentDistance(nn.Module):
    """How far apart a frozen Whisper encoder finds two sounds.

    The mean over its layers l of

        mean | h_l(made) - h_l(real) | / mean | h_l(real) |.

    A perceptual loss (Johnson et al. 2016, arXiv 1603.08155) on speech: losses on spectra weigh all errors alike; the
    encoder was trained to hear words, so that what tells sounds apart weighs most.

    Args:
        model: folder, hub name or `pretrained:` name of a Whisper. A recognizer that later scores the vocoder should be
            another one.

    Raises:
        SparqError: it is no Whisper, or its tensors do not fit.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        folder = resolve_model(model)
        config: Any = AutoConfig.from_pretrained(folder)
        if config.model_type != "whisper":
            raise SparqError(f"train.content_model {model!r} is of the kind {config.model_type}: expected a whisper")
        used = r"(conv|embed_positions|layer_norm|layers\.\d+)"
        self.encoder: Any = load_lower_part(
            WhisperEncoder, folder, config, used=used, key_mapping={r"^(model\.)?encoder\.": ""}
        )
        self.eval().requires_grad_(False)

    def forward(self, made: Float[Tensor, "batch samples"], real: Float[Tensor, "batch samples"]) -> Float[Tensor, ""]:
        """Return the distance; gradients go to `made` alone."""
        with torch.no_grad():
            theirs = self.layers(real)
        pairs = zip(self.layers(made), theirs, strict=True)
        return torch.stack([(a - b).float().abs().mean() / b.float().abs().mean() for a, b in pairs]).mean()

    def layers(self, samples: Float[Tensor, "batch samples"]) -> list[Float[Tensor, "batch frames dim"]]:
        """Return the output of every layer; positions start at the beginning of each sound."""
        with torch.autocast(samples.device.type, enabled=False):
            mel = whisper_log_mel(samples, self.encoder.config.num_mel_bins)
        hidden = nn.functional.gelu(self.encoder.conv1(mel))
        hidden = nn.functional.gelu(self.encoder.conv2(hidden)).transpose(1, 2)  # batch frames dim
        hidden = hidden + self.encoder.embed_positions.weight[: hidden.shape[1]]
        outputs = []
        for layer in self.encoder.layers:
            hidden = layer(hidden, None)
            outputs.append(hidden)
        return outputs


def whisper_log_mel(samples: Float[Tensor, "batch samples"], num_mels: int) -> Float[Tensor, "batch mels frames"]:
    """Return what Whisper hears of sounds (Radford et al. 2022, section 2.2), with gradients.

    log10 of mel bands of powers, at most eight decades below the clip's maximum, plus 4, divided by 4.
    """
    bands = power_bands(samples, size=_FFT, hop=_HOP, num_mels=num_mels)
    logarithms = bands.clamp(min=1e-10).log10()
    floor = logarithms.amax(dim=(1, 2), keepdim=True) - _RANGE
    return (logarithms.maximum(floor) + 4) / 4
