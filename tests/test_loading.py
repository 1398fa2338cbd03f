"""Checkpoints that do not fit their config are refused, with the tensor named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models import load_backbone


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_tensor(tiny_opt: PreTrainedModel, tmp_path: Path) -> None:
    tiny_opt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    removed = next(name for name in tensors if "fc1.weight" in name)
    rewrite(tmp_path, {k: v for k, v in tensors.items() if k != removed})
    with pytest.raises(SparqError, match="1 missing tensors, the first .*fc1.weight"):
        load_backbone(str(tmp_path))


def test_an_unused_tensor(tiny_opt: PreTrainedModel, tmp_path: Path) -> None:
    tiny_opt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {**tensors, "model.decoder.layers.7.fc1.weight": torch.ones(2)})
    with pytest.raises(SparqError, match="1 unexpected tensors"):
        load_backbone(str(tmp_path))


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match="cannot load a causal LM from"):
        load_backbone(str(tmp_path))


def test_tensors_are_counted(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path), attention="learned_sink")
    assert loaded.num_tensors == 20
    assert loaded.num_parameters == sum(p.numel() for p in tiny_llama.parameters())
