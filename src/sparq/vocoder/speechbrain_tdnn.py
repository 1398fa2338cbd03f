"""Speaker vectors by the two time-delay networks of SpeechBrain: x-vectors and ECAPA-TDNN.

x-vectors (Snyder et al. 2018) are convolutions over mel bands, their mean and deviation over time, and a projection to
512 numbers. ECAPA-TDNN (Desplanques et al. 2020) adds residual and squeeze-excitation blocks, takes mean and deviation
by attention, and gives 192 numbers. The networks and the mel bands are SpeechBrain's own. Its loader is not used: it
executes a model's `hyperparams.yaml` and unpickles its checkpoint. Here only tensors are read, and the network's width
is read off them. All else is as in the published models `speechbrain/spkrec-xvect-voxceleb` and
`speechbrain/spkrec-ecapa-voxceleb`: kernels, dilations, and log-mel bands every 10 ms less their mean over the clip.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from safetensors.torch import load_file
from torch import Tensor, nn

from sparq.errors import SparqError
from sparq.files import fingerprint
from sparq.units.checkpoint import hash_tensors

WEIGHTS = ("embedding_model.safetensors", "embedding_model.ckpt")
"""Names of the file that holds the network, the first that is there."""

_SHORTEST = 800  # samples: six frames, because the convolutions mirror up to four at each end


class TdnnEncoder:
    """Waveforms to speaker vectors; follows `sparq.vocoder.speaker.SpeakerEncoder`.

    Clips go through one by one: the convolutions mirror a clip at its ends, which padding would replace by silence.
    """

    def __init__(self, network: nn.Module, mel_bands: nn.Module, *, kind: str, dim: int) -> None:
        self.dim = dim
        self.fingerprint = fingerprint(kind, hash_tensors(network))
        self._network, self._mel_bands = network, mel_bands

    @torch.inference_mode()
    def embed(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> Float32[np.ndarray, "clips speaker_dim"]:
        """Return the vector of each clip; one that is too short for the convolutions is repeated until it is not."""
        vectors = torch.cat([self._vector(waveform) for waveform in waveforms])
        return nn.functional.normalize(vectors, dim=1).numpy()

    def _vector(self, waveform: Float32[np.ndarray, "samples"]) -> Float[Tensor, "1 speaker_dim"]:
        if len(waveform) < _SHORTEST:
            waveform = np.resize(waveform, _SHORTEST)  # repeats it
        bands = self._mel_bands(torch.from_numpy(waveform)[None])  # 1 frames mels
        # The pooling of x-vectors adds noise of 1e-5 to 9e-5 to each mean, in use too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            vector: Tensor = self._network(bands - bands.mean(dim=1, keepdim=True))  # 1 1 speaker_dim
        return vector[:, 0]


def load_tdnn(file: Path) -> TdnnEncoder:
    """Load an x-vector or ECAPA-TDNN network of SpeechBrain; every tensor must fit.

    Args:
        file: `embedding_model.safetensors`, or `embedding_model.ckpt`, of which nothing but tensors is unpickled.

    Raises:
        SparqError: SpeechBrain is not installed, or the file is damaged, holds more than tensors or another network.
    """
    tensors = _read_tensors(file)
    try:
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
        from speechbrain.lobes.models.Xvector import Xvector
    except ImportError as error:
        raise SparqError(f"speaker encoder {file} needs speechbrain: pip install 'sparq[speakers]'") from error
    kind = "ECAPA-TDNN" if "fc.conv.weight" in tensors else "x-vector"
    try:
        if kind == "ECAPA-TDNN":
            num_mels, dim, shape = _ecapa_shape(tensors)
            network: nn.Module = ECAPA_TDNN(input_size=num_mels, lin_neurons=dim, **shape)
        else:
            num_mels, dim, shape = _xvector_shape(tensors)
            network = Xvector(in_channels=num_mels, lin_neurons=dim, **shape)
        network.load_state_dict(tensors)
    except (KeyError, IndexError, AssertionError, RuntimeError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise SparqError(f"{file} does not hold the {kind} of SpeechBrain: {detail[:200]}") from error
    return TdnnEncoder(network.eval().requires_grad_(False), Fbank(n_mels=num_mels), kind=kind, dim=dim)


def _ecapa_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int, dict[str, Any]]:
    """Return mel bands, length of a vector, and the rest of ECAPA-TDNN's shape."""
    first, last = tensors["blocks.0.conv.conv.weight"], tensors["mfa.conv.conv.weight"]  # each: out in kernel
    middle = [tensors[f"blocks.{i}.tdnn2.conv.conv.weight"] for i in (1, 2, 3)]
    channels = [len(weight) for weight in (first, *middle, last)]
    shape = {
        "channels": channels,
        "kernel_sizes": [5, 3, 3, 3, 1],
        "dilations": [1, 2, 3, 4, 1],
        "attention_channels": len(tensors["asp.tdnn.conv.conv.weight"]),
        "se_channels": len(tensors["blocks.1.se_block.conv1.conv.weight"]),
        "res2net_scale": channels[1] // len(tensors["blocks.1.res2net_block.blocks.0.conv.conv.weight"]),
    }
    return first.shape[1], len(tensors["fc.conv.weight"]), shape


def _xvector_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int, dict[str, Any]]:
    """Return mel bands, length of a vector, and the rest of the x-vector network's shape."""
    # An activation and a norm stand behind each convolution.
    convolutions = [tensors[f"blocks.{i}.conv.weight"] for i in (0, 3, 6, 9, 12)]  # each: out in kernel
    shape = {
        "tdnn_blocks": 5,
        "tdnn_channels": [len(weight) for weight in convolutions],
        "tdnn_kernel_sizes": [5, 3, 3, 1, 1],
        "tdnn_dilations": [1, 2, 3, 1, 1],
    }
    return convolutions[0].shape[1], len(tensors["blocks.16.w.weight"]), shape


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read named tensors; nothing else is unpickled."""
    try:
        # A pickle of a stranger may name any code, and a damaged one fails in any way.
        content = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise SparqError(
            f"{file} is damaged or holds more than tensors, which are not unpickled: copy it again, or save the"
            " network's state as embedding_model.safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SparqError(f"{file} holds other things than named tensors: expected the state of SpeechBrain's network")
    return content
