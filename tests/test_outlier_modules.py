"""Outliers of the parts of blocks against what hooks see, one sequence at a time, and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_families import FAMILIES, tiny_model
from outlier_data import padded, sequences
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers
from sparq.models import convert
from sparq.models.families import family_of

ROWS = sequences(9, 1, 4, 17)
PROJECTION = {"opt": "out_proj", "gpt_neox": "dense"}


def seen(model: nn.Module, names: list[str], *, inputs: bool) -> dict[str, list[np.ndarray]]:
    """Outputs (or inputs) of modules, [tokens, width] of each sequence."""
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def watch(name: str) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name].append((args[0] if inputs else output).flatten().double().numpy())

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    with torch.no_grad():
        for row in ROWS:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: [x.reshape(len(row), -1) for x, row in zip(kept[name], ROWS, strict=True)] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["sequence", "tensor", "token"])
def test_parts_equal_a_reference_that_stores_them(family: str, reduction: str) -> None:
    model = convert(tiny_model(family), "softmax1")
    layout = family_of(model)
    report = measure_outliers(model, [padded(ROWS[:2]), padded(ROWS[2:], "left")], modules=True, reduction=reduction)
    plain = measure_outliers(model, [padded(ROWS)], reduction=reduction)
    assert plain.modules == {}
    assert plain.max_inf_norm == pytest.approx(report.max_inf_norm, rel=1e-4)
    blocks = [f"{layout.blocks}.{index}" for index in range(2)]
    attention = [f"{block}.{layout.attention}" for block in blocks]
    parts = [name for name in report.modules if name not in attention]
    expected = seen(model, parts, inputs=False)
    projection = PROJECTION.get(layout.model_type, "o_proj")
    mixed = seen(model, [f"{name}.{projection}" for name in attention], inputs=True)
    expected |= {name.removesuffix(f".{projection}"): value for name, value in mixed.items()}
    assert set(expected) == set(report.modules)
    # Every linear layer and every norm of a block, and the attention.
    kinds = {type(model.get_submodule(name)) for name in parts}
    inside = [n for block in blocks for n, m in model.get_submodule(block).named_modules() if type(m) in kinds]
    assert len(parts) == len(inside) == len([n for n in parts if n.endswith("norm")]) + 2 * len(layout.linears)
    for name, found in report.modules.items():
        tensors = expected[name]
        norms = [np.abs(x).max() for x in tensors]
        assert found.max_inf_norm == pytest.approx(max(norms), rel=1e-4), name
        assert found.mean_inf_norm == pytest.approx(np.mean(norms), rel=1e-4), name
        whole = np.concatenate(tensors)
        kurtosis = {
            "sequence": np.mean([stats.kurtosis(x.ravel(), fisher=False) for x in tensors]),
            "tensor": stats.kurtosis(whole.ravel(), fisher=False),
            "token": stats.kurtosis(whole, axis=1, fisher=False).mean(),
        }
        assert found.kurtosis == pytest.approx(kurtosis[reduction], rel=1e-3), name


def test_an_outlier_inside_a_block_is_named() -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[5] = 4321.0
    report = measure_outliers(model, [padded(ROWS)], modules=True)
    worst = max(report.modules, key=lambda name: report.modules[name].max_inf_norm)
    assert worst == "model.decoder.layers.1.fc1"
    assert report.modules[worst].max_inf_norm == pytest.approx(4321, rel=0.01)


def test_a_part_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = torch.inf
    with pytest.raises(SparqError, match=r"output of model\.layers\.0\.mlp\.up_proj has an element that is (inf|nan)"):
        measure_outliers(model, [padded(ROWS)], modules=True)


def test_a_constant_part_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
    with pytest.raises(SparqError, match=r"kurtosis of the output of .*0\.self_attn\.k_proj is undefined"):
        measure_outliers(model, [padded(ROWS)], modules=True)
