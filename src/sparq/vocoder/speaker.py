"""Who speaks, as a vector: the choice of an encoder, and what all of them have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from huggingface_hub import snapshot_download
from jaxtyping import Float32

from sparq.errors import SparqError
from sparq.pretrained.quiet import quiet_transformers
from sparq.vocoder.ge2e import load_ge2e
from sparq.vocoder.speechbrain_tdnn import WEIGHTS, load_tdnn
from sparq.vocoder.transformers_xvector import load_xvector

VOICE_ENCODER = "pretrained:voice-encoder"
"""The reference of the built-in encoder."""

_FROM_HUB = (*WEIGHTS, "config.json", "preprocessor_config.json", "model*.safetensors*")


@runtime_checkable
class SpeakerEncoder(Protocol):
    """Turns clips into vectors that are near to each other if one person speaks.

    Attributes:
        dim: numbers of a vector.
        fingerprint: of its kind and its weights, never of a path. Vectors of unlike fingerprints cannot be compared.
    """

    dim: int
    fingerprint: str

    def embed(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> Float32[np.ndarray, "clips speaker_dim"]:
        """Return the vector of each clip of 16 kHz mono samples, of length 1.

        Up to rounding, a clip's vector does not depend on the clips beside it.
        """
        ...


def load_speaker_encoder(reference: str = VOICE_ENCODER, *, cache: Path | None = None) -> SpeakerEncoder:
    """Load a speaker encoder.

    Args:
        reference: `pretrained:voice-encoder`; or a folder or hub name of an x-vector or ECAPA-TDNN model of SpeechBrain
            (it holds `embedding_model.ckpt`), or of an x-vector model of transformers (it holds `config.json`).
        cache: folder of the built-in one; None takes the usual cache, and the first use downloads its wheel.

    Raises:
        SparqError: there is no such encoder, its tensors do not fit, or it needs SpeechBrain, which is not installed.
    """
    if reference == VOICE_ENCODER:
        return load_ge2e(cache)
    folder = _folder(reference)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return load_tdnn(folder / name)
    if (folder / "config.json").is_file():
        return load_xvector(folder)
    raise SparqError(f"{folder} holds no speaker encoder: expected {', '.join(WEIGHTS)} or config.json in it")


def _folder(reference: str) -> Path:
    """Return the folder itself, or the one to which a model of the hub was downloaded."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    try:
        if reference.startswith((".", "~", "/")):
            raise FileNotFoundError("no such folder")
        with quiet_transformers():
            return Path(snapshot_download(reference, allow_patterns=list(_FROM_HUB)))
    except (OSError, ValueError) as error:  # both of no such repository and of no possible name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SparqError(
            f"no speaker encoder {reference!r}: {reason}; expected {VOICE_ENCODER}, a folder, or a hub name such as"
            " speechbrain/spkrec-ecapa-voxceleb"
        ) from error
