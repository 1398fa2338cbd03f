"""Outlier instruments against slow references, hand-made outliers, padding and a real pretrained model."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outlier_data import MODELS, eager, one_by_one, padded, sequences
from sparq.errors import SparqError
from sparq.evaluation.activation_sums import Reduction
from sparq.evaluation.attention_maps import head_maps, most_sinky_head, token_norms
from sparq.evaluation.attention_statistics import SINK_THRESHOLD
from sparq.evaluation.observation import observe
from sparq.evaluation.outlier_report import OutlierReport
from sparq.evaluation.outliers import measure_outliers
from sparq.evaluation.seen_attention import SeenAttention
from sparq.models import convert, converted_layers
from sparq.models.families import attention_layers, decoder_blocks

PROSE = (
    "The lighthouse keeper had lived alone for so long that he spoke to the gulls as if they were neighbors. "
    "Every evening he climbed the narrow stairs, trimmed the lamp, and wrote down the weather in a small "
    "blue book. On the last night of October a ship came in close to the rocks, and rang a bell until dawn."
)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return eager(request.getfixturevalue(request.param))


def close(a: OutlierReport, b: OutlierReport, rel: float = 1e-4) -> None:
    left, right = a.to_dict(), b.to_dict()
    assert left.keys() == right.keys()
    layers = zip(left.pop("layers"), right.pop("layers"), strict=True)
    for x, y in [(left, right), *layers]:
        for name in [name for name, value in y.items() if not isinstance(value, (int, float))]:
            assert x.pop(name) == y.pop(name), name
        assert x == pytest.approx(y, rel=rel)


def slow_reference(model: PreTrainedModel, rows: list[Tensor]) -> dict[str, object]:
    """Store everything, one unpadded sequence at a time, then use scipy and loops."""
    hiddens: list[list[np.ndarray]] = []  # [sequence][layer] -> tokens hidden
    maps: list[list[np.ndarray]] = []  # [sequence][layer] -> heads queries keys
    for row in rows:
        kept: list[np.ndarray] = []
        handles = [
            block.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[0].double().numpy()))
            for block in decoder_blocks(model)
        ]
        with torch.no_grad():
            outputs = model(row[None], output_attentions=True)
        for handle in handles:
            handle.remove()
        hiddens.append(kept)
        maps.append([p[0].double().numpy() for p in outputs.attentions])
    num_layers = len(hiddens[0])
    per_layer = [[sequence[i] for sequence in hiddens] for i in range(num_layers)]
    mass, first, sink, entropy = [], [], [], []
    for sequence in maps:
        for heads in sequence:
            for p in heads:
                mass += list(p.sum(axis=1))
                if len(p) == 1:
                    continue
                sinks = [k for k in range(len(p)) if np.mean([p[q, k] for q in range(1, len(p))]) > SINK_THRESHOLD]
                for q in range(1, len(p)):
                    first.append(p[q, 0])
                    sink.append(sum(p[q, k] for k in sinks))
                    entropy.append(stats.entropy(p[q]))
    return {
        "max_inf_norm": max(np.abs(x).max() for xs in per_layer for x in xs),
        "mean_inf_norm": max(np.mean([np.abs(x).max() for x in xs]) for xs in per_layer),
        "sequence": [np.mean([stats.kurtosis(x.ravel(), fisher=False) for x in xs]) for xs in per_layer],
        "tensor": [stats.kurtosis(np.concatenate(xs).ravel(), fisher=False) for xs in per_layer],
        "token": [stats.kurtosis(np.concatenate(xs), axis=1, fisher=False).mean() for xs in per_layer],
        "attention_mass": np.mean(mass),
        "first_token_share": np.mean(first),
        "sink_rate": np.mean(sink),
        "attention_entropy": np.mean(entropy),
    }


# The whole report


@pytest.mark.parametrize("reduction", ["sequence", "tensor", "token"])
def test_report_equals_a_reference_that_stores_everything(model: PreTrainedModel, reduction: Reduction) -> None:
    rows = sequences(9, 1, 4, 17, 6)
    batches = [padded(rows[:2]), padded(rows[2:], side="left")]
    report = measure_outliers(model, batches, reduction=reduction)
    expected = slow_reference(model, rows)
    for name in ("max_inf_norm", "mean_inf_norm", "first_token_share", "sink_rate", "attention_entropy"):
        assert getattr(report, name) == pytest.approx(expected[name], rel=1e-4), name
    assert report.attention_mass == pytest.approx(1, abs=1e-6)
    assert [layer.kurtosis for layer in report.layers] == pytest.approx(expected[reduction], rel=1e-4)
    assert report.mean_kurtosis == pytest.approx(np.mean(expected[reduction]), rel=1e-4)
    assert (report.num_sequences, report.num_tokens, report.reduction) == (5, 37, reduction)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: PreTrainedModel, side: str) -> None:
    rows = sequences(5, 11, 3)
    alone = measure_outliers(model, one_by_one(rows))
    close(measure_outliers(model, [padded(rows, side=side, to=20)]), alone)


def test_padding_is_measured_nowhere(tiny_llama: PreTrainedModel) -> None:
    """Poisoned padding embeddings are far larger than everything else."""
    model, rows = eager(tiny_llama), [row.clamp(min=4) for row in sequences(6, 3)]
    alone = measure_outliers(model, one_by_one(rows))
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 1e6
    close(measure_outliers(model, [padded(rows, "right", to=9)]), alone)
    close(measure_outliers(model, [padded(rows, "left", to=9)]), alone)


def test_the_order_and_the_size_of_batches_do_not_matter(model: PreTrainedModel) -> None:
    rows = sequences(8, 8, 5, 2)
    for reduction in ("sequence", "tensor", "token"):
        one = measure_outliers(model, [padded(rows)], reduction=reduction)
        close(measure_outliers(model, iter(one_by_one(reversed(rows))), reduction=reduction), one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_injected_outlier_is_found_where_it_is(model: PreTrainedModel, side: str) -> None:
    layer, position, channel, value = 1, 4, 23, -4321.0
    batch = padded(sequences(6, 10), side=side, to=12)
    before = measure_outliers(model, [batch])
    place = position if side == "right" else position + 12 - 10

    def inject(_module: object, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, place, channel] = value
        return output

    handle = decoder_blocks(model)[layer].register_forward_hook(inject)
    report = measure_outliers(model, [batch])
    handle.remove()
    found = report.layers[layer]
    assert report.max_inf_norm == found.max_inf_norm == -value
    assert (found.argmax_token_position, found.argmax_channel) == (position, channel)
    assert found.kurtosis > 5 * before.layers[layer].kurtosis
    assert -value / 2 < found.mean_inf_norm < -value  # one of two sequences
    assert report.layers[0] == before.layers[0]  # the layer before it


def test_the_final_norm_is_apart(tiny_llama: PreTrainedModel, tiny_opt_post_norm: PreTrainedModel) -> None:
    model, batch = eager(tiny_llama), padded(sequences(8))
    before = measure_outliers(model, [batch])
    with torch.no_grad():
        model.model.norm.weight.mul_(1000)
        states = model(batch["input_ids"], output_hidden_states=True).hidden_states
    after = measure_outliers(model, [batch])
    assert before.final_norm_max_inf_norm is not None
    assert after.final_norm_max_inf_norm == pytest.approx(states[-1].abs().max().item(), rel=1e-5)
    assert after.final_norm_max_inf_norm == pytest.approx(1000 * before.final_norm_max_inf_norm, rel=1e-5)
    assert after.max_inf_norm == before.max_inf_norm
    assert measure_outliers(eager(tiny_opt_post_norm), [batch]).final_norm_max_inf_norm is None


def test_sdpa_models_are_measured_with_the_eager_formula(model: PreTrainedModel) -> None:
    batch = padded(sequences(8, 5))
    expected = measure_outliers(model, [batch])
    model.set_attn_implementation("sdpa")
    close(measure_outliers(model, [batch]), expected)
    assert model.config._attn_implementation == "sdpa"
    assert converted_layers(model) == []
    assert not any(attention._forward_pre_hooks for attention in attention_layers(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["vanilla", "softmax1", "max_shift"])
def test_converted_models(request: pytest.FixtureRequest, name: str, variant: str) -> None:
    model, rows = request.getfixturevalue(name), sequences(7, 4, 12)
    reference = measure_outliers(eager(model), one_by_one(rows))
    convert(model, variant)
    report = measure_outliers(model, [padded(rows, "left", to=15)])
    close(report, measure_outliers(model, one_by_one(rows)))
    assert model.config._attn_implementation == "sparq"  # as before
    if variant == "vanilla":
        close(report, reference)
    else:
        assert report.attention_mass < 0.999
        assert report.first_token_share < reference.first_token_share
    if variant == "max_shift":
        assert all(layer.attention_mass >= 0.5 for layer in report.layers)


def test_the_report_survives_json(tiny_llama: PreTrainedModel) -> None:
    report = measure_outliers(eager(tiny_llama), [padded(sequences(5, 3))])
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert len(plain["layers"]) == 2
    assert plain["mean_kurtosis"] == pytest.approx(sum(x["kurtosis"] for x in plain["layers"]) / 2)


def test_measuring_leaves_the_model_as_it_was(tiny_opt: PreTrainedModel) -> None:
    model = eager(tiny_opt).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    frozen, other = decoder_blocks(model)
    frozen.eval()
    batch = padded(sequences(9, 9))
    assert measure_outliers(model, [batch]) == measure_outliers(model, [batch])  # dropout is off
    assert (model.training, frozen.training, frozen.fc1.training, other.training) == (
        True,
        False,
        False,
        True,
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = model(batch["input_ids"], output_attentions=True)
    assert all(probabilities.ndim == 4 for probabilities in plain.attentions)  # no hook of ours is left


def test_one_layer_of_probabilities_is_alive_at_a_time(tiny_llama: PreTrainedModel) -> None:
    """Even where transformers installed its own collector before."""
    model, row = eager(tiny_llama), sequences(6)[0]
    model(row[None], output_attentions=True)
    seen: list[weakref.ref[Tensor]] = []

    def on_attention(index: int, attention: SeenAttention) -> None:
        assert len(seen) == index
        assert all(reference() is None for reference in seen)
        seen.append(weakref.ref(attention.probabilities))

    observe(model, row[None], torch.ones(1, 6), on_attention=on_attention)
    assert len(seen) == 2


def test_bfloat16_models_are_measured_in_float32(tiny_llama: PreTrainedModel) -> None:
    model, batch = eager(tiny_llama), padded(sequences(12, 7))
    wide = measure_outliers(model, [batch])
    narrow = measure_outliers(model.bfloat16(), [batch])
    assert narrow.max_inf_norm == pytest.approx(wide.max_inf_norm, rel=0.1)
    assert narrow.attention_mass == pytest.approx(1, abs=0.01)


# Mistakes


def test_mistakes_are_one_line(tiny_llama: PreTrainedModel) -> None:
    model, (row,) = eager(tiny_llama), sequences(5)
    batch = padded([row])
    empty = {**batch, "attention_mask": torch.zeros(1, 5)}
    mistakes: list[tuple[str, Callable[[], object]]] = [
        ("'sequence'", lambda: measure_outliers(model, [batch], reduction="sequense")),  # type: ignore[arg-type]
        ("0 tokens", lambda: measure_outliers(model, [])),
        ("1 tokens", lambda: measure_outliers(model, [padded([row[:1]])])),
        ("no attention_mask", lambda: measure_outliers(model, [{"input_ids": row[None]}])),
        (r"\[5\]", lambda: measure_outliers(model, [{"input_ids": row, "attention_mask": row}])),
        ("sequence 0 .* no tokens", lambda: measure_outliers(model, [empty])),
        ("no layer 2: .* 0 to 1", lambda: head_maps(model, row, 2, 0)),
        ("no head -1: .* 0 to 3", lambda: head_maps(model, row, 0, -1)),
        ("1 tokens", lambda: most_sinky_head(model, row[:1])),
    ]
    for message, act in mistakes:
        with pytest.raises(SparqError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_attention_without_probabilities_is_refused(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(_module: object, query: Tensor, *_args: object, **_options: object) -> tuple[Tensor, None]:
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fused", fused)
    tiny_llama.set_attn_implementation("fused")
    with pytest.raises(SparqError, match=r"'fused' returns no probabilities.*'eager'"):
        measure_outliers(tiny_llama, [padded(sequences(5))])
    assert token_norms(tiny_llama, sequences(5)[0]).shape == (2, 5)  # no hook is left behind


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_activation_that_is_not_finite_is_refused(tiny_llama: PreTrainedModel, value: float) -> None:
    model = eager(tiny_llama)
    with torch.no_grad():
        decoder_blocks(model)[1].mlp.down_proj.weight[3] = value
    with pytest.raises(SparqError, match=r"output of layer 1 has an element that is (inf|nan)"):
        measure_outliers(model, [padded(sequences(5))])


def test_a_constant_layer_is_refused(tiny_llama: PreTrainedModel) -> None:
    model = eager(tiny_llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(SparqError, match="kurtosis of the output of layer 0 is undefined"):
        measure_outliers(model, [padded(sequences(5))])


# The real thing


def test_a_pretrained_model_carries_massive_activations_on_its_first_token(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, attn_implementation="eager", dtype=torch.float32)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"][:, :60]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert ids.shape == (1, 60)
    report = measure_outliers(model, [batch])
    assert report.max_inf_norm > 1000
    assert report.mean_kurtosis > 1000
    assert report.attention_mass == pytest.approx(1, abs=1e-5)
    worst = max(report.layers, key=lambda layer: layer.max_inf_norm)
    assert worst.argmax_token_position == 0
    assert report.first_token_share > 0.3
    norms = token_norms(model, ids[0])
    assert norms.max().item() == pytest.approx(report.max_inf_norm, rel=1e-5)
    assert norms[:, 0].max() > 10 * norms[:, 1:].max()
    layer, head = most_sinky_head(model, ids[0])
    assert head_maps(model, ids[0], layer, head).probabilities[1:, 0].mean() > 0.9
    softened = measure_outliers(convert(model, "softmax1"), [batch])
    assert 0.8 < softened.attention_mass < 0.999
