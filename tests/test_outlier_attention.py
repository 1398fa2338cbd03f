"""Largest logits and norms of values against transformers' eager scores and its own projections."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model_families import FAMILIES, tiny_model
from outlier_data import one_by_one, padded, sequences
from sparq.evaluation import measure_outliers
from sparq.evaluation.attention_statistics import SINK_THRESHOLD, sink_tokens
from sparq.evaluation.value_norms import ValueNorms
from sparq.models import convert
from sparq.models.families import attention_layers

ROWS = sequences(9, 1, 4, 17)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_largest_logit_is_that_of_transformers(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    largest = [-np.inf, -np.inf]
    layer = 0

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        nonlocal layer
        seen = scores[scores > torch.finfo(scores.dtype).min / 2]
        largest[layer % 2] = max(largest[layer % 2], seen.max().item())
        layer += 1
        return torch.softmax(scores, dim)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", softmax)
        for row in ROWS:
            model(row[None])
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        report = measure_outliers(model, [padded(ROWS, side)])
        assert [found.max_logit for found in report.layers] == pytest.approx(largest, rel=1e-4)
        assert report.max_logit == max(found.max_logit for found in report.layers)


@pytest.mark.parametrize("family", ["llama", "opt", "opt_350m"])
@pytest.mark.parametrize("attention", ["vanilla", "softmax1"])
def test_value_norms_are_those_of_the_projections(family: str, attention: str) -> None:
    model = convert(tiny_model(family), attention)
    first: list[float] = []
    sinks: list[float] = []
    others: list[float] = []
    for row in ROWS:
        projected: list[Tensor] = []
        handles = [
            layer.v_proj.register_forward_hook(lambda _m, _a, out, kept=projected: kept.append(out[0]))
            for layer in attention_layers(model)
        ]
        with torch.no_grad():
            maps = model(row[None], output_attentions=True).attentions
        for handle in handles:
            handle.remove()
        if len(row) == 1:
            continue
        for layer_maps, values in zip(maps, projected, strict=True):
            shared = values.view(len(row), -1, 8)  # tokens kv_heads head_dim
            for head, p in enumerate(layer_maps[0].double().numpy()):
                spent = p[1:].sum()
                for token in range(len(row)):
                    norm = shared[token, head * shared.shape[1] // 4].norm().item()
                    is_sink = p[1:, token].sum() > SINK_THRESHOLD * spent
                    if token == 0:
                        first.append(norm)
                    if is_sink:
                        sinks.append(norm)
                    elif token:
                        others.append(norm)
    assert sinks
    for batches in (one_by_one(ROWS), [padded(ROWS, "left")]):
        report = measure_outliers(model, batches)
        assert report.first_value_norm == pytest.approx(np.mean(first), rel=1e-4)
        assert report.sink_value_norm == pytest.approx(np.mean(sinks), rel=1e-4)
        assert report.other_value_norm == pytest.approx(np.mean(others), rel=1e-4)


def test_value_norms_by_hand() -> None:
    p = torch.zeros(2, 3, 3)
    p[0, :, 0] = 1  # a head with its sink on the first token
    p[1] = torch.eye(3)  # one that looks at itself: each of the last two takes half
    values = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 7.0], [9.0, 0.0]]])
    assert sink_tokens(p).tolist() == [[True, False, False], [False, True, True]]
    norms = ValueNorms.of(sink_tokens(p), values)
    assert (norms.num_first, norms.num_sinks, norms.num_others) == (2, 3, 2)
    assert (norms.first, norms.sinks, norms.others) == (7, 21, 11)
    twice = norms + norms
    assert (twice.mean_first, twice.mean_sinks, twice.mean_others) == (3.5, 7, 5.5)


def test_without_a_choice_or_a_sink_there_is_no_norm() -> None:
    nothing = ValueNorms.of(torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1, 4))
    assert nothing == ValueNorms()
    assert nothing.mean_first is nothing.mean_sinks is nothing.mean_others is None
    even = torch.ones(1, 40, 40).tril() / torch.arange(1, 41)[:, None]
    assert ValueNorms.of(sink_tokens(even), torch.ones(1, 40, 4)).mean_sinks is None
