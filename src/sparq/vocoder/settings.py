"""How a vocoder is trained."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a vocoder is trained.

    Attributes:
        updates: optimizer steps.
        batch: pieces a step; E.3: 64.
        frames: length of a piece in units of 20 ms.
        learning_rate: Adam's; E.3: 8e-4.
        final_rate: share of `learning_rate` that is left at the end; falls exponentially.
        beta1: Adam's first moment; HiFi-GAN: 0.8.
        beta2: Adam's second moment; HiFi-GAN: 0.99.
        clip_norm: the norm that gradients are clipped to.
        adversarial_from: the update from which discriminators take part.
        mel_weight: of the multi-resolution log-mel distance.
        spectral_weight: of the multi-resolution magnitude distance.
        pitch_weight: of the pitch's error in octaves.
        adversarial_weight: of the discriminators' verdict.
        matching_weight: of feature matching; HiFi-GAN: 2.
        duration_weight: of the durations' likelihood.
        content_weight: of the distance of what is said; 0 leaves `content_model` unread.
        content_model: the Whisper that hears it.
        ema: decay of the averaged weights, which are those that are kept.
        dtype: of the network's computation; losses and weights are float32.
        checkpoint_updates: updates between checkpoints.
        validate_updates: updates between validations.
        memory_hours: hours of decoded audio that are kept in memory, 0.23 GB each; the rest is read again each time.
        seed: of initial weights and draws.
    """

    updates: int = 400_000
    batch: int = 64
    frames: int = 28
    learning_rate: float = 8e-4
    final_rate: float = 0.1
    beta1: float = 0.8
    beta2: float = 0.99
    clip_norm: float = 1000.0
    adversarial_from: int = 0
    mel_weight: float = 45.0
    spectral_weight: float = 0.0
    pitch_weight: float = 1.0
    adversarial_weight: float = 1.0
    matching_weight: float = 2.0
    duration_weight: float = 1.0
    content_weight: float = 0.0
    content_model: str = "pretrained:whisper-tiny.en"
    ema: float = 0.999
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_updates: int = 500
    validate_updates: int = 1000
    memory_hours: float = 4.0
    seed: int = 0

    def rate(self, update: int) -> float:
        """Return the learning rate of an update."""
        return float(self.learning_rate * self.final_rate ** (update / self.updates))
