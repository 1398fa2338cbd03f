"""Massive activations: planted ones are found with what wrote them, and SmolLM2's are where they are known to be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.errors import SparqError
from sparq.evaluation import MassiveActivation, find_massive_activations
from sparq.models import convert, load_model
from sparq.models.families import decoder_blocks, family_of

TOKEN, CHANNEL = 7, 3


@contextmanager
def planted(model: PreTrainedModel, block: int, part: str, size: float) -> Iterator[None]:
    """One part of a block adds `size` to a channel wherever the token is."""
    seen: list[Tensor] = []

    def write(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(*seen[-1].shape, -1)[..., CHANNEL][seen[-1] == TOKEN] += size
        return output

    reads = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    writes = decoder_blocks(model)[block].get_submodule(part).register_forward_hook(write)
    try:
        yield
    finally:
        reads.remove()
        writes.remove()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """The token at the first place of the first sequence, twice in the second, which has padding on the left."""
    ids = torch.tensor([[7, 11, 12, 13, 14, 15], [7, 20, 7, 21, 22, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt_350m"])
@pytest.mark.parametrize("part", ["output", "down"])
def test_planted_ones_are_found(family: str, part: str, batch: dict[str, Tensor]) -> None:
    model = convert(tiny_model(family), "softmax1").eval()
    layout = family_of(model)
    assert find_massive_activations(model, [batch]).found == ()
    last = len(decoder_blocks(model)) - 1
    block, name = last, getattr(layout, part)
    with planted(model, block, name, -9000.0):
        report = find_massive_activations(model, [batch, batch])
    for one in report.found:
        assert one.value == pytest.approx(-9000, rel=1e-2)
    module = f"{layout.blocks}.{block}.{name}"
    places = [(0, 0), (1, 1), (1, 4), (2, 0), (3, 1), (3, 4)]
    assert [(o.sequence, o.position, o.token_id, o.channel, o.blocks, o.module) for o in report.found] == [
        (sequence, position, TOKEN, CHANNEL, (block, block), module) for sequence, position in places
    ]
    assert (report.num_sequences, report.num_with, report.num_at_first) == (4, 4, 2)
    assert report.tokens == {TOKEN: 6}
    assert report.writers == {(module, CHANNEL): 6}


def test_they_last_from_block_to_block(batch: dict[str, Tensor]) -> None:
    model = tiny_model("llama").eval()
    last = len(decoder_blocks(model)) - 1
    assert last > 0
    with planted(model, 0, "mlp.down_proj", 9000.0):
        found = find_massive_activations(model, [batch]).found
        assert {one.blocks for one in found} == {(0, last)}
        assert {one.module for one in found} == {"model.layers.0.mlp.down_proj"}
        assert find_massive_activations(model, [batch], threshold=10_000.0).found == ()
        assert find_massive_activations(model, [batch], ratio=1e9).found == ()


def test_a_batch_needs_a_mask(batch: dict[str, Tensor]) -> None:
    with pytest.raises(SparqError, match="has no attention_mask"):
        find_massive_activations(tiny_model("llama"), [{"input_ids": batch["input_ids"]}])


@pytest.mark.pretrained
def test_smollm2_has_them_at_the_first_token(smollm2_folder: Path) -> None:
    model, tokenizer = load_model(str(smollm2_folder)), AutoTokenizer.from_pretrained(smollm2_folder)
    texts = ["The harbour was quiet that morning.", "Once upon a time, a fox met a crow; the crow had a cheese."]
    report = find_massive_activations(model, [dict(tokenizer(text, return_tensors="pt")) for text in texts])
    assert (report.num_sequences, report.num_with, report.num_at_first) == (2, 2, 2)
    largest = max(report.found, key=lambda one: abs(one.value))
    assert isinstance(largest, MassiveActivation)
    assert abs(largest.value) > 10_000
    assert largest.module.endswith("mlp.down_proj")
    assert largest.blocks == (11, 27)
