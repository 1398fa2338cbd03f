"""The fused adapter layer and its dropout against PEFT's layer and PyTorch's."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from model_families import tiny_model
from sparq.adaptation import LoraSettings, add_lora
from sparq.adaptation.dropout import Dropout, expand
from sparq.adaptation.lora import quicken
from sparq.adaptation.lora_linear import LoraLinear


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 20, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def adapted(bias: bool, dropout: float = 0.0, **options: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(
        Net(bias), LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["layer"], **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 1, 12)])
def test_equals_peft(bias: bool, shape: tuple[int, ...]) -> None:
    theirs = adapted(bias).double()
    ours = copy.deepcopy(theirs)
    quicken(ours)
    assert isinstance(ours.base_model.model.layer, LoraLinear)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(out, [x, *(p for p in model.parameters() if p.requires_grad)], grad)
        for out, model in zip(outputs, (ours, theirs), strict=True)
    ]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_dropout_is_that_of_the_low_rank_part() -> None:
    """With the mask at hand: W x + c / (1 - p) B A (mask x), and the gradient of that."""
    model = adapted(True, dropout=0.3).double().train()
    quicken(model)
    layer = model.base_model.model.layer
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    dropout = layer.lora_dropout["default"]
    kept = (expand(dropout.draw(x.numel()), x) == -1).double()
    assert 0 < kept.mean() < 1
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.get_base_layer()
    expected = base(x) + 7 / 3 * dropout.scale * (x * kept) @ a.T @ b.T
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad(out, (x, a, b), grad), torch.autograd.grad(expected, (x, a, b), grad), strict=True
    ):
        torch.testing.assert_close(mine, other)
    model.eval()
    torch.testing.assert_close(model(x), base(x) + 7 / 3 * x @ a.T @ b.T)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_adapters_are_peft_s(options: dict[str, object]) -> None:
    theirs = adapted(True, **options)
    ours = copy.deepcopy(theirs)
    quicken(ours)
    x = torch.randn(4, 12)
    assert torch.equal(ours(x), theirs(x))


def test_switched_off_and_merged() -> None:
    model = adapted(True)
    quicken(model)
    x = torch.randn(4, 12)
    before = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.base_model.model.layer.get_base_layer()(x))
    merged = model.merge_and_unload()
    assert type(merged.layer) is nn.Linear
    torch.testing.assert_close(merged(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropout(dtype: torch.dtype) -> None:
    dropout = Dropout(0.05)
    assert dropout.p == pytest.approx(0.05, abs=2**-16)
    x = torch.ones(401, 503, dtype=dtype, requires_grad=True)
    out = dropout(x)
    rate = float((out == 0).double().mean())
    assert abs(rate - 0.05) < 5 * math.sqrt(0.05 * 0.95 / x.numel())
    assert (out[out != 0] == torch.tensor(dropout.scale, dtype=torch.float64).to(dtype)).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out.detach())
    # Neighbors, which share a random number, are independent.
    zero = (out.detach() == 0).double().flatten()
    for distance in (1, 2, 3, 4):
        assert abs(float((zero[distance:] * zero[:-distance]).mean()) - 0.05**2) < 5 * 0.05 / math.sqrt(x.numel())
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert dropout.eval()(x) is x


def test_a_model_gets_it() -> None:
    model = add_lora(tiny_model("llama"), LoraSettings(rank=2, dropout=0.1))
    kinds = {type(m) for m in model.modules() if isinstance(m, Linear)}
    assert kinds == {LoraLinear}
    assert {type(d) for m in model.modules() if isinstance(m, Linear) for d in m.lora_dropout.values()} == {Dropout}
