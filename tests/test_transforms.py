"""Every transform leaves the model in floating point as it was, in every family, with every attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.attention import ATTENTION_NAMES
from sparq.models import convert
from sparq.quantization import load_quantized, quantize, save_quantized

METHODS = ["smoothquant", "rotation", "omniquant", "affinequant", "best"]
ATTENTIONS = [*ATTENTION_NAMES, "softmax1+clipped", "softmax1+gated_elementwise"]


def shaken(family: str, attention: str) -> PreTrainedModel:
    """A model with norms, biases, sinks and gates that are not at their starting values."""
    model = convert(tiny_model(family), attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "outlier_free" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight[:, 3] += 5.0  # an outlier channel, and a mean that is not 0
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits.double()[mask.bool()]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_model_is_unchanged(family: str, attention: str, method: str, batch: dict[str, Tensor]) -> None:
    model = shaken(family, attention)
    before = logits(model, *batch.values())
    same = quantize(model, [batch], method=method, weight_bits=16, activation_bits=16, epochs=1, change_rate=1e-9)
    after = logits(same, *batch.values())
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert torch.equal(logits(model, *batch.values()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_spreads_an_outlier(family: str) -> None:
    model = shaken(family, "vanilla")
    rotated = quantize(model, method="rotation", weight_bits=16, activation_bits=16)

    def peak(of: PreTrainedModel) -> float:
        weight = of.get_input_embeddings().weight.detach()
        return float((weight.abs().amax(1) / weight.norm(dim=1)).mean())

    assert peak(rotated) < (1.01 if family == "opt_350m" else 0.8) * peak(model)


@pytest.mark.parametrize("attention", ["vanilla", "softmax1+gated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_models_are_saved_and_loaded(
    family: str, attention: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = shaken(family, attention)
    quantized = quantize(model, [batch], method="rotation", weight_bits=4, activation_bits=4, activation_clip=0.9)
    save_quantized(quantized, tmp_path / "model")
    again = load_quantized(tmp_path / "model")
    assert torch.equal(logits(again, *batch.values()), logits(quantized, *batch.values()))
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, quantized, again)]
    assert len(set(tied)) == 1
