"""Fixtures: tiny random models of each family, and the real thing where it is at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Triton, which transformers imports, decides then whether it compiles its kernels or interprets them.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from transformers import PreTrainedModel

from model_families import random_model

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("sparq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sparq")


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
def voice_encoder_folder() -> Path:
    return _pretrained("voice-encoder")


@pytest.fixture
def human_data() -> Path:
    folder = os.environ.get("SPARQ_HUMAN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no human speech: set SPARQ_HUMAN_DATA to a folder with an4, digits, ...")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeded_and_threaded() -> Iterator[None]:
    """Every test has the same random numbers and as many threads as it was started with: recipes set theirs."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Grouped-query attention, tied embeddings: SmolLM2's shape made small."""
    return random_model("llama")


@pytest.fixture
def tiny_opt() -> PreTrainedModel:
    """Pre-norm, as OPT-125m and OPT-1.3b."""
    return random_model("opt")


@pytest.fixture
def tiny_opt_post_norm() -> PreTrainedModel:
    """Post-norm with project_in and project_out, as OPT-350m."""
    return random_model("opt_350m")


@pytest.fixture
def ids() -> Tensor:
    """Two sequences for any of these models, without its special tokens."""
    return torch.randint(3, 96, (2, 16))
