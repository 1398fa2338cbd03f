"""The function-preserving start, and the mass that a variant takes away."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.attention import NORMALIZATIONS, SCHEDULED, SinkSchedule
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import removed_mass
from sparq.models import convert, load_model, recording_attention
from sparq.models.conversion import attention_parameters

IDS = torch.randint(4, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def with_sinks(family: str, name: str) -> PreTrainedModel:
    """A converted model; learned sinks are not where they start."""
    model = convert(tiny_model(family), name)
    for parameter in attention_parameters(model).values():
        torch.nn.init.uniform_(parameter, -1, 1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCHEDULED)
def test_it_starts_at_the_pretrained_model_and_ends_at_its_own(name: str, family: str) -> None:
    plain = tiny_model(family)
    model = with_sinks(family, name)
    schedule = SinkSchedule(model, updates=10)
    with torch.no_grad():
        end = model(IDS).logits
        schedule.set(0)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        way = []
        for update in range(11):
            schedule.set(update)
            way.append(model(IDS).logits)
        assert torch.equal(way[-1], end)
    distances = [(logits - way[0]).norm() for logits in way]
    assert distances == sorted(distances)
    # No step makes most of the way.
    steps = [(b - a).norm() for a, b in itertools.pairwise(way)]
    assert max(steps) < 0.7 * sum(steps)


def test_a_learned_sink_is_trained_from_its_first_weight_on() -> None:
    model = with_sinks("llama", "learned_sink")
    schedule = SinkSchedule(model, updates=4)
    gradients = []
    for update in range(5):
        schedule.set(update)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([parameter.grad for parameter in attention_parameters(model).values()]))
    assert not gradients[0].any()
    assert all(gradient.isfinite().all() and gradient.all() for gradient in gradients[1:])


def test_the_weight_is_linear() -> None:
    schedule = SinkSchedule(convert(tiny_model("llama"), "softmax1"), updates=4)
    assert schedule.log_weight(0) == -math.inf
    assert [math.exp(schedule.log_weight(u)) for u in (1, 2, 3, 4, 9)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_model_saved_on_the_way_is_loaded_on_the_way(name: str, tmp_path: Path) -> None:
    model = with_sinks("llama", name)
    SinkSchedule(model, updates=4).set(1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path))(IDS).logits, model(IDS).logits)


def test_mistakes() -> None:
    with pytest.raises(SparqError, match="it needs at least 1"):
        SinkSchedule(convert(tiny_model("llama"), "softmax1"), updates=0)
    with pytest.raises(SparqError, match="ends at softmax1 or learned_sink, but the model has max_shift"):
        SinkSchedule(convert(tiny_model("llama"), "max_shift"), updates=4)
    with pytest.raises(SparqError, match="but the model has nothing converted"):
        SinkSchedule(tiny_model("llama"), updates=4)
    with pytest.raises(SparqError, match="the model is not converted"):
        removed_mass(tiny_model("llama"), [{"input_ids": IDS}], ["softmax1"])
    with pytest.raises(SparqError, match="nothing to measure on"):
        removed_mass(convert(tiny_model("llama"), "vanilla"), [], ["softmax1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_mass_of_the_first_layer_is_what_the_variant_has_left(family: str) -> None:
    """In the first layer the scores are the same, so the converted model itself tells."""
    model = tiny_model(family)
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    names = [name for name in NORMALIZATIONS if name != "none"]
    found = removed_mass(convert(copy.deepcopy(model), "vanilla"), [batch, batch], names)
    assert found.num_tokens == 2 * int(mask.sum())
    for name, mass in zip(found.variants, found.mass, strict=True):
        variant = convert(copy.deepcopy(model), name)
        with torch.no_grad(), recording_attention(variant):
            first = variant(**batch, output_attentions=True).attentions[0]
        rows = first.sum(dim=-1).transpose(1, 2)[mask.bool()]
        torch.testing.assert_close(mass[0], 1 - rows.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.pretrained
def test_the_command(smollm2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    command = ["convert", str(smollm2_folder), "--attention", "learned_sink", "--out", str(out)]
    assert main([*command, "--report", "--tokens", "60"]) == 0
    printed = capsys.readouterr().out
    assert "on 60 tokens; rows are layers" in printed
    assert printed.count("\n     29") == 4
    assert load_model(str(out)).config.sparq_attention == "learned_sink"
    assert main(command) == 2
    assert "exists: choose a folder that does not" in capsys.readouterr().err
    assert main(["convert", str(smollm2_folder), "--attention", "sofmax1", "--out", str(tmp_path / "b")]) == 2
    assert "unknown attention 'sofmax1': did you mean 'softmax1'" in capsys.readouterr().err
    assert main(["convert", str(smollm2_folder), "--attention", "softmax1"]) == 2
    assert "needs --attention NAME with --out DIR" in capsys.readouterr().err
