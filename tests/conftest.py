"""Fixtures: tiny random models of each family, and the real thing where it is at hand."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM


def _pretrained(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparq" / "pretrained"
    folder = Path(os.environ.get("SPARQ_PRETRAINED", cache)) / name
    if not (folder / "config.json").exists():
        pytest.skip(f"no pretrained weights at {folder}: `sparq pretrained` builds them")
    return folder


@pytest.fixture
def smollm2_folder() -> Path:
    return _pretrained("smollm2-135m")


@pytest.fixture
def whisper_folder() -> Path:
    return _pretrained("whisper-tiny.en")


@pytest.fixture
def human_data() -> Path:
    folder = os.environ.get("SPARQ_HUMAN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no human speech: set SPARQ_HUMAN_DATA to a folder with an4, digits, ...")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Grouped-query attention, tied embeddings: SmolLM2's shape made small."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _opt(**changes: object) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        **{"word_embed_proj_dim": 32, "do_layer_norm_before": True, **changes},
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.fixture
def tiny_opt() -> OPTForCausalLM:
    """Pre-norm, as OPT-125m and OPT-1.3b."""
    return _opt()


@pytest.fixture
def tiny_opt_post_norm() -> OPTForCausalLM:
    """Post-norm with project_in and project_out, as OPT-350m."""
    return _opt(word_embed_proj_dim=16, do_layer_norm_before=False)
