"""A speaker encoder (generalized end-to-end loss, Wan et al. 2018) out of the wheel of Resemblyzer; Apache-2.0."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from sparq.files import write_json
from sparq.pretrained.wheels import Wheel

WHEEL = Wheel(
    requirement="resemblyzer==0.1.4",
    package="resemblyzer",
    sha256="8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
)

WEIGHTS = "The speaker encoder's weights are those that the package Resemblyzer 0.1.4 carries"

_TRAINING_ONLY = ("similarity_weight", "similarity_bias")


def build(package: Path, out: Path) -> None:
    """Write the LSTM and its projection as safetensors.

    Args:
        package: the unpacked wheel.
        out: the folder to write.
    """
    # The file comes out of a wheel whose hash was checked, and weights_only unpickles nothing but tensors.
    content = torch.load(package / "pretrained.pt", map_location="cpu", weights_only=True)
    state = {name: tensor.contiguous() for name, tensor in content["model_state"].items() if name not in _TRAINING_ONLY}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {"model_type": "ge2e-lstm", "mels": 40, "hidden_size": 256, "layers": 3})
