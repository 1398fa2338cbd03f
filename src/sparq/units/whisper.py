"""Features from a layer of Whisper's encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sparq.bfloat16 import fast_products
from sparq.process_memory import trim_heap
from sparq.types import SAMPLE_RATE
from sparq.units.batching import cut_evenly, length_sorted
from sparq.units.checkpoint import check_layer, hash_tensors, load_lower_part, read_preprocessor

_HOP = 320  # samples per frame: 160 by the mel spectrogram, times the stride 2 of the second convolution
_TAIL = 15  # frames of silence (0.3 s) behind a clip that its attention sees
_FRAMES_PER_BATCH = 6000


class WhisperFeatures:
    """The hidden states after layer n of Whisper's encoder (Radford et al. 2022, section 2.2), at 50 Hz.

    Whisper's own input is a window of 30 s, mostly silence for a short clip. Several clips in one window are
    fast, but their features then depend on place and neighbors: with Whisper-tiny, layer 2 and 200 units,
    half of the units of AN4 changed when the clips were packed in another order, and seven in ten when a clip
    was alone. So here each clip is encoded by itself: positions start at its beginning, and it attends to
    itself and the 0.3 s of silence behind it. Length-sorted batches with a padding mask make that as fast.
    The loudness floor of the log-mel spectrogram (80 dB below the maximum) is the clip's own too.

    A clip of s samples has ceil(s / 320) frames. Clips of more than 29.7 s are cut into equal pieces.
    """

    def __init__(
        self, encoder: Any, preprocessor: Any, *, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dim: int = encoder.config.d_model
        self.frame_rate = SAMPLE_RATE / _HOP
        self.fingerprint: dict[str, Any] = {
            "kind": "whisper",
            "context": "clip",  # not the window of 30 s: other units than from Whisper as it is published
            "layer": layer,
            "dtype": str(dtype).removeprefix("torch."),
            "weights": hash_tensors(encoder),
        }
        self._preprocessor = preprocessor
        self._encoder = encoder.to(device, dtype)
        self._longest = encoder.config.max_source_positions - _TAIL

    @torch.inference_mode()
    def extract(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[Float32[np.ndarray, "_frames dim"]]:
        """Return the features of each clip, in order."""
        features = [np.empty((-(-len(w) // _HOP), self.dim), np.float32) for w in waveforms]
        pieces, targets = [], []
        for waveform, target in zip(waveforms, features, strict=True):
            for start, stop in cut_evenly(len(target), self._longest):
                pieces.append(waveform[start * _HOP : stop * _HOP])
                targets.append(target[start:stop])
        for batch in length_sorted([len(t) + _TAIL for t in targets], _FRAMES_PER_BATCH):
            lengths = [len(targets[i]) for i in batch]
            with fast_products(self._encoder.device, self._encoder.dtype, self._encoder):
                hidden = self._encode([pieces[i] for i in batch], lengths).float().cpu().numpy()
            for row, i in enumerate(batch):
                targets[i][:] = hidden[row, : len(targets[i])]
            trim_heap(self._encoder.device)
        return features

    def _encode(
        self, pieces: Sequence[Float32[np.ndarray, "_samples"]], lengths: Sequence[int]
    ) -> Float[Tensor, "batch frames dim"]:
        encoder = self._encoder
        weight = encoder.conv1.weight
        frames = max(lengths) + _TAIL
        # A frame of silence before and behind, so that what is kept never sees the edge of a convolution.
        samples = np.zeros((len(pieces), (frames + 2) * _HOP), np.float32)
        for row, piece in enumerate(pieces):
            samples[row, _HOP : _HOP + len(piece)] = piece
        mel = self._preprocessor(
            list(samples), sampling_rate=SAMPLE_RATE, max_length=samples.shape[1], return_tensors="pt"
        ).input_features.to(weight.device, weight.dtype)
        hidden = nn.functional.gelu(encoder.conv1(mel))
        hidden = nn.functional.gelu(encoder.conv2(hidden))  # batch dim frames+2
        hidden = hidden.transpose(1, 2)[:, 1:-1] + encoder.embed_positions.weight[:frames]
        ends = torch.tensor(lengths, device=weight.device)[:, None] + _TAIL
        seen = torch.arange(frames, device=weight.device) < ends  # batch frames
        mask = None if bool(seen.all()) else seen[:, None, None, :].expand(-1, 1, frames, -1)
        for layer in encoder.layers:
            hidden = layer(hidden, mask)
        output: Tensor = hidden
        return output


def load_whisper(model: str, config: Any, *, layer: int, dtype: torch.dtype, device: torch.device) -> WhisperFeatures:
    """Load the first `layer` layers of the encoder of a Whisper checkpoint; the decoder is not built.

    Raises:
        SparqError: no such layer, or tensors are missing, unknown or misshapen.
    """
    check_layer(layer, config.encoder_layers, model)
    config.encoder_layers = layer
    encoder = load_lower_part(
        WhisperEncoder,
        model,
        config,
        used=rf"(conv|embed_positions|layer_norm)|layers\.({'|'.join(map(str, range(layer)))})\.",
        key_mapping={r"^(model\.)?encoder\.": ""},
    )
    # The norm behind the whole stack does not belong to a layer inside it.
    encoder.layer_norm = nn.Identity()
    return WhisperFeatures(encoder, read_preprocessor(model), layer=layer, dtype=dtype, device=device)
