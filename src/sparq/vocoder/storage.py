"""The folder of a trained vocoder.

```
vocoder.json          what it is: generator, units, speaker encoder, voices, how it was trained
model.safetensors     weights and the vectors of its voices
kmeans.safetensors    the units
```
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparq.configuration import from_mapping, to_mapping
from sparq.errors import SparqError
from sparq.files import atomic_path, read_json, write_json
from sparq.units import KMeans
from sparq.vocoder.config import GeneratorConfig, HifiGanConfig, LightConfig
from sparq.vocoder.speaker import VOICE_ENCODER
from sparq.vocoder.voice import VocoderNetworks

FORMAT = 1
DESCRIPTION = "vocoder.json"
_WEIGHTS = "model.safetensors"
_KMEANS = "kmeans.safetensors"
_VOICES = "voices"
_CONFIGS: dict[str, type[GeneratorConfig]] = {"light": LightConfig, "hifigan": HifiGanConfig}


@dataclass(frozen=True, kw_only=True)
class UnitSource:
    """How recordings become the units that a vocoder knows: a run's section `units`.

    Attributes:
        features: reference of the feature model.
        layer: its layer.
        dtype: of its arithmetic.
    """

    features: str
    layer: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class VocoderDescription:
    """What `vocoder.json` says.

    Attributes:
        kind: `light` or `hifigan`.
        generator: settings of that generator.
        num_units: size of the unit alphabet.
        units_fingerprint: of the k-means.
        units: how recordings become units.
        speaker_encoder: fingerprint of the encoder that made the speaker vectors.
        speaker_encoder_reference: from where to load it; older vocoders, which do not say it, had the built-in one.
        voices: names of the stored speaker vectors.
        default_voice: the one that speaks unless another is asked for.
        training: how the weights came about.
        format: version of the folder.
    """

    kind: Literal["light", "hifigan"]
    generator: dict[str, Any]
    num_units: int
    units_fingerprint: str
    units: UnitSource
    speaker_encoder: str
    voices: tuple[str, ...]
    default_voice: str
    speaker_encoder_reference: str = VOICE_ENCODER
    training: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def config(self) -> GeneratorConfig:
        """The settings of the generator."""
        return from_mapping(_CONFIGS[self.kind], self.generator, where="generator")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocoder:
    """A vocoder ready for use.

    Attributes:
        networks: generator and duration predictor, in float32.
        voices: speaker vectors, in the order of `description.voices`.
        description: what it is.
        folder: where it is.
    """

    networks: VocoderNetworks
    voices: Float32[np.ndarray, "voices speaker_dim"]
    description: VocoderDescription
    folder: Path

    @property
    def kmeans(self) -> KMeans:
        """The centroids of its units."""
        return KMeans.load(self.folder / _KMEANS)

    def voice(self, name: str | None = None) -> Float32[np.ndarray, "speaker_dim"]:
        """Return the vector of a stored voice, the default one if no name is given.

        Raises:
            SparqError: there is no such voice.
        """
        names = self.description.voices
        name = self.description.default_voice if name is None else name
        if name not in names:
            raise SparqError(f"{self.folder} has no voice {name!r}: it has {', '.join(names)}")
        vector: np.ndarray = self.voices[names.index(name)]
        return vector


def save_vocoder(
    folder: Path,
    networks: VocoderNetworks,
    voices: Float32[np.ndarray, "voices speaker_dim"],
    description: VocoderDescription,
    *,
    kmeans_file: Path,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a vocoder, whole or not at all.

    Args:
        folder: where to; an older vocoder there is replaced.
        networks: the weights.
        voices: a vector for each name in the description.
        description: becomes `vocoder.json`.
        kmeans_file: centroids of the units.
        dtype: of the stored weights; float16 halves the file, and computing stays in float32.
    """
    assert len(voices) == len(description.voices)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in networks.state_dict().items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file({**tensors, _VOICES: torch.from_numpy(voices)}, temporary / _WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(kmeans_file, temporary / _KMEANS)
        write_json(temporary / DESCRIPTION, to_mapping(description))


def vocoder_files(folder: Path) -> list[Path]:
    """Return the files that a vocoder folder has."""
    return [folder / name for name in (DESCRIPTION, _WEIGHTS, _KMEANS)]


def read_vocoder_description(folder: Path) -> VocoderDescription:
    """Read `vocoder.json`.

    Raises:
        SparqError: the folder is no vocoder or of another format.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise SparqError(f"{folder} is not a vocoder folder: it has no {DESCRIPTION}; `sparq vocoder train` makes one")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SparqError(f"{path} is not a vocoder description of format {FORMAT}: train it again with this version")
    return from_mapping(VocoderDescription, content, where=str(path))


def load_vocoder(folder: Path, *, units_fingerprint: str | None = None) -> Vocoder:
    """Load a vocoder.

    Args:
        folder: what `save_vocoder` wrote.
        units_fingerprint: of the k-means whose units it shall speak.

    Raises:
        SparqError: the folder is damaged, or its units are others.
    """
    folder = Path(folder)
    description = read_vocoder_description(folder)
    if units_fingerprint is not None and description.units_fingerprint != units_fingerprint:
        raise SparqError(
            f"vocoder {folder} speaks units {description.units_fingerprint}, but the model's are {units_fingerprint}:"
            " train one on the model's run with `sparq vocoder train` and name it with --vocoder"
        )
    networks = VocoderNetworks(description.config, description.num_units)
    file = folder / _WEIGHTS
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        voices = tensors.pop(_VOICES).numpy()
        networks.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise SparqError(f"{file} does not hold this vocoder: {detail[:200]}; copy or train it again") from error
    if len(voices) != len(description.voices):
        raise SparqError(
            f"{file} has {len(voices)} voices, {DESCRIPTION} names {len(description.voices)}: copy it again"
        )
    found = KMeans.load(folder / _KMEANS).fingerprint
    if found != description.units_fingerprint:
        raise SparqError(
            f"{folder / _KMEANS} has fingerprint {found}, but the vocoder was trained on units"
            f" {description.units_fingerprint}: restore the file that it was trained with"
        )
    return Vocoder(
        networks=networks.eval().requires_grad_(False), voices=voices, description=description, folder=folder
    )


def generator_kind(config: GeneratorConfig) -> Literal["light", "hifigan"]:
    """Return the name under which a generator's settings are stored."""
    return "light" if isinstance(config, LightConfig) else "hifigan"
