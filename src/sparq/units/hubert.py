"""Features from a layer of HuBERT, wav2vec 2.0 or WavLM."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import HubertModel, Wav2Vec2Model, WavLMModel

from sparq.bfloat16 import fast_products
from sparq.process_memory import trim_heap
from sparq.types import SAMPLE_RATE, Seconds
from sparq.units.batching import cut_evenly, length_sorted
from sparq.units.checkpoint import check_layer, hash_tensors, load_lower_part, read_preprocessor

MODEL_CLASSES = {"hubert": HubertModel, "wav2vec2": Wav2Vec2Model, "wavlm": WavLMModel}

_LONGEST: Seconds = 40.0
_FRAMES_PER_BATCH = 4096


class HubertFeatures:
    """The output of transformer layer n, counted from 1 as in fairseq and the paper (HuBERT-base, layer 6).

    The result for a clip does not depend on the clips beside it. The convolutions run clip by clip: base
    models normalize over time there (`feat_extract_norm="group"`), so that padding would change every frame.
    The transformer runs on length-sorted batches with a padding mask.

    A clip of s samples has floor((s - 400) / 320) + 1 frames for the usual seven convolutions, and none below
    400 samples. Clips of more than 40 s are cut into equal pieces, because attention is quadratic; the frame
    grid goes on across the cuts.
    """

    def __init__(self, model: Any, *, normalize: bool, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self.dim: int = config.hidden_size
        self._hop: int = math.prod(config.conv_stride)
        self._field = _receptive_field(config.conv_kernel, config.conv_stride)
        self.frame_rate = SAMPLE_RATE / self._hop
        self.fingerprint: dict[str, Any] = {
            "kind": config.model_type,
            "layer": layer,
            "dtype": str(dtype).removeprefix("torch."),
            "normalize": normalize,
            "weights": hash_tensors(model),
        }
        self._normalize = normalize
        # A batch norm before the positional convolution turns padding into non-zeros: one clip at a time.
        self._frames_per_batch = 0 if getattr(config, "conv_pos_batch_norm", False) else _FRAMES_PER_BATCH
        _fold_weight_norm(model)
        self._model = model.to(device, dtype)
        self._device, self._dtype = device, dtype

    @torch.inference_mode()
    def extract(self, waveforms: Sequence[Float32[np.ndarray, "_samples"]]) -> list[Float32[np.ndarray, "_frames dim"]]:
        """Return the features of each clip, in order."""
        features = [np.empty((self._num_frames(len(w)), self.dim), np.float32) for w in waveforms]
        targets: list[np.ndarray] = []  # views into `features`, one per piece
        fronts: list[Tensor] = []  # each: frames conv_dim
        for waveform, target in zip(waveforms, features, strict=True):
            scaled = _standardize(waveform) if self._normalize and len(target) else waveform
            for start, stop in cut_evenly(len(target), int(_LONGEST * self.frame_rate)):
                # The rest behind the last frame counts in the normalization over time, so it stays.
                end = (stop - 1) * self._hop + self._field if stop < len(target) else len(scaled)
                samples = scaled[start * self._hop : end]
                with fast_products(self._device, self._dtype, self._model):
                    fronts.append(self._convolve(samples))
                targets.append(target[start:stop])
        for batch in length_sorted([len(f) for f in fronts], self._frames_per_batch):
            with fast_products(self._device, self._dtype, self._model):
                hidden = self._transform([fronts[i] for i in batch]).float().cpu().numpy()
            for row, i in enumerate(batch):
                targets[i][:] = hidden[row, : len(targets[i])]
            trim_heap(self._device)
        return features

    def _num_frames(self, samples: int) -> int:
        return max(0, (samples - self._field) // self._hop + 1)

    def _convolve(self, samples: Float32[np.ndarray, "samples"]) -> Float[Tensor, "frames conv_dim"]:
        values = torch.from_numpy(samples).to(self._device, self._dtype)
        output: Tensor = self._model.feature_extractor(values[None])
        return output[0].T

    def _transform(self, fronts: list[Float[Tensor, "_frames conv_dim"]]) -> Float[Tensor, "batch longest dim"]:
        padded = nn.utils.rnn.pad_sequence(fronts, batch_first=True)
        lengths = torch.tensor([len(f) for f in fronts], device=self._device)
        mask = torch.arange(padded.shape[1], device=self._device) < lengths[:, None]
        hidden = self._model.feature_projection(padded)
        if isinstance(hidden, tuple):  # wav2vec 2.0 and WavLM return the normalized input too
            hidden = hidden[0]
        with warnings.catch_warnings():
            # WavLM hands torch a boolean mask beside a float bias; torch warns, but the result is right.
            warnings.filterwarnings("ignore", message="Support for mismatched", category=UserWarning)
            encoded = self._model.encoder(hidden, attention_mask=None if bool(mask.all()) else mask)
        output: Tensor = encoded.last_hidden_state
        return output


def load_hubert(model: str, config: Any, *, layer: int, dtype: torch.dtype, device: torch.device) -> HubertFeatures:
    """Load the first `layer` layers of a HuBERT, wav2vec 2.0 or WavLM checkpoint.

    Raises:
        SparqError: no such layer, or tensors are missing, unknown or misshapen.
    """
    check_layer(layer, config.num_hidden_layers, model)
    config.num_hidden_layers = layer
    # Without masking and adapters the class has only the tensors that are used here.
    config.mask_time_prob = config.mask_feature_prob = 0.0
    if getattr(config, "add_adapter", False):
        config.add_adapter = False
    used = "|".join(map(str, range(layer)))
    loaded = load_lower_part(
        MODEL_CLASSES[config.model_type],
        model,
        config,
        used=rf"(\w+\.)?(feature_|encoder\.(pos_conv_embed|layer_norm|layers\.({used})\.))",
    )
    if config.do_stable_layer_norm:
        # Pre-norm models have one more norm behind the whole stack: it belongs to no layer inside.
        loaded.encoder.layer_norm = nn.Identity()
    normalize = bool(read_preprocessor(model).do_normalize)
    return HubertFeatures(loaded, normalize=normalize, layer=layer, dtype=dtype, device=device)


def _receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (kernel - 1) * step
        step *= stride
    return field


def _standardize(waveform: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "samples"]:
    """Zero mean and unit variance, as `Wav2Vec2FeatureExtractor(do_normalize=True)`."""
    scaled: np.ndarray = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
    return scaled


def _fold_weight_norm(model: nn.Module) -> None:
    """Replace weight-normalized weights by their product: faster, and exact before a cast to bfloat16."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
