"""An interrupted quantization goes on, and ends with the bits of one that was not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_families import tiny_model
from sparq.errors import SparqError
from sparq.models import convert
from sparq.quantization import quantize
from sparq.quantization.distillation import _backward
from sparq.quantization.gptq import gptq_round
from sparq.quantization.learned import _train

W4 = {"weight_bits": 4, "activation_bits": 8}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 96, (3, 16))


class Stop(Exception):  # noqa: N818
    """An interruption."""


def stop_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> list[int]:
    """Interrupt GPTQ after so many layers; the list counts them."""
    calls = [0]

    def counted(*arguments: object, **options: object) -> Tensor:
        if calls[0] == layers:
            raise Stop
        calls[0] += 1
        return gptq_round(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("sparq.quantization.compensation.gptq_round", counted)
    return calls


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("method", ["gptq", "rotation"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt_350m"])
@pytest.mark.parametrize("layers", [0, 5, 9])
def test_it_goes_on_with_the_same_bits(
    method: str, family: str, layers: int, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert(tiny_model(family), "softmax1")
    settings = {"method": method, **W4}
    expected = quantize(model, [ids], **settings)
    linears = len([name for name in expected.state_dict() if name.endswith("weight_scale")])
    with monkeypatch.context() as patch:
        stop_after(patch, min(layers, linears - 1))
        with pytest.raises(Stop):
            quantize(model, [ids], resume=tmp_path / "blocks", **settings)
    finished = len(list((tmp_path / "blocks").glob("block-*.safetensors")))
    assert finished == min(layers, linears - 1) // (linears // 2)
    with monkeypatch.context() as patch:
        calls = stop_after(patch, -1)
        assert same(quantize(model, [ids], resume=tmp_path / "blocks", **settings), expected)
        assert calls[0] == linears - finished * linears // 2
    with monkeypatch.context() as patch:  # a third call finds every block
        calls = stop_after(patch, -1)
        assert same(quantize(model, [ids], resume=tmp_path / "blocks", **settings), expected)
        assert calls[0] == 0


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("activation_bits", [4, 16])
def test_learned_blocks_are_not_trained_again(
    method: str, activation_bits: int, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert(tiny_model("opt"), "softmax1")
    settings = {"method": method, "weight_bits": 4, "activation_bits": activation_bits, "epochs": 3}
    expected = quantize(model, [ids], **settings)
    trained: list[int] = []

    def counted(learned: object, stream: object, index: int, *rest: object) -> tuple[float, float]:
        if index in (1, 3) and len(trained) == index:
            trained.append(index)
            raise Stop
        trained.append(index)
        return _train(learned, stream, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("sparq.quantization.learned._train", counted)
    with pytest.raises(Stop):
        quantize(model, [ids], resume=tmp_path / "blocks", **settings)
    for _ in range(2):
        assert same(quantize(model, [ids], resume=tmp_path / "blocks", **settings), expected)
    assert trained == [0, 1, 1]


@pytest.mark.parametrize("low_rank", [None, 3])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_training_of_the_whole_model_goes_on(
    steps: int, low_rank: int | None, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparq.quantization.distillation._KEPT_EVERY", 2)
    model = convert(tiny_model("llama"), "softmax1")
    settings = {"method": "best", "weight_bits": 4, "activation_bits": 4, "epochs": 2, "low_rank": low_rank}
    batches = [ids, ids.flip(0), ids.flip(1)]
    expected = quantize(model, batches, **settings)
    made = 0

    def counted(*arguments: object) -> float:
        nonlocal made
        if made == steps:
            raise Stop
        made += 1
        return _backward(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("sparq.quantization.distillation._backward", counted)
        with pytest.raises(Stop):
            quantize(model, batches, resume=tmp_path / "made", **settings)
        made = -100
        assert same(quantize(model, batches, resume=tmp_path / "made", **settings), expected)
        assert made + 100 == 6 - steps // 2 * 2
        made = steps  # a third call finds everything
        assert same(quantize(model, batches, resume=tmp_path / "made", **settings), expected)


def test_blocks_of_something_else_are_refused(ids: Tensor, tmp_path: Path) -> None:
    model, blocks = tiny_model("llama"), tmp_path / "blocks"
    settings = {"method": "gptq", **W4, "layers": {"model.layers.1.mlp.up_proj": {"weight_bits": 3}}}
    made = quantize(model, [ids], resume=blocks, **settings)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    others = {
        "scheme": (model, [ids], {**settings, "gptq_damping": 0.02}),
        "weights": (tiny_model("llama").double(), [ids], settings),
        "attention": (convert(tiny_model("llama"), "softmax1"), [ids], settings),
        "calibration data": (model, [ids, masked], settings),
    }
    for what, (other, batches, changed) in others.items():
        with pytest.raises(SparqError, match=f"made from another {what}: choose another folder"):
            quantize(other, batches, resume=blocks, **changed)
    assert same(quantize(tiny_model("llama"), [ids.clone()], resume=blocks, **settings), made)
    labels = ids.clone()
    quantize(model, [{**masked, "labels": labels}], resume=tmp_path / "labeled", **settings)
    labels[0, 3] = -100
    with pytest.raises(SparqError, match="made from another calibration data"):
        quantize(model, [{**masked, "labels": labels}], resume=tmp_path / "labeled", **settings)


def test_damaged_and_foreign_folders(ids: Tensor, tmp_path: Path) -> None:
    model, blocks = tiny_model("llama"), tmp_path / "blocks"
    made = quantize(model, [ids], resume=blocks, method="gptq", **W4)
    file = blocks / "block-0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SparqError, match=r"block-0001\.safetensors is damaged .* remove it, and what it held"):
        quantize(model, [ids], resume=blocks, method="gptq", **W4)
    (tmp_path / "other").touch()
    file.unlink()
    assert same(quantize(model, [ids], resume=blocks, method="gptq", **W4), made)
    assert file.read_bytes() == whole
    with pytest.raises(SparqError, match="holds something else than an unfinished quantization"):
        quantize(model, [ids], resume=tmp_path, method="gptq", **W4)
    with pytest.raises(SparqError, match="w4a8-rtn is done in seconds, nothing of it is kept: leave resume out"):
        quantize(model, [ids], resume=tmp_path / "new", method="rtn", **W4)
    assert not (tmp_path / "new").exists()
