"""Maps of single heads and tokens against transformers' own."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from outlier_data import MODELS, eager, sequences
from sparq.evaluation.attention_maps import head_maps, most_sinky_head, token_norms
from sparq.models.families import attention_layers, decoder_blocks


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return eager(request.getfixturevalue(request.param))


def test_maps_equal_those_of_transformers(model: PreTrainedModel) -> None:
    (row,) = sequences(9)
    states: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _i, out: states.append(out)) for b in decoder_blocks(model)]
    with torch.no_grad():
        expected = model(row[None], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    for layer in range(2):
        for head in range(4):
            torch.testing.assert_close(head_maps(model, row, layer, head).probabilities, expected[layer][0, head])
    projected: list[Tensor] = []
    mixed: list[Tensor] = []
    for attention in attention_layers(model):
        out = getattr(attention, "out_proj", None) or attention.o_proj
        handles += [
            attention.v_proj.register_forward_hook(lambda _m, _a, out: projected.append(out)),
            out.register_forward_pre_hook(lambda _m, args: mixed.append(args[0])),
        ]
    with torch.no_grad():
        model(row[None])
    for handle in handles:
        handle.remove()
    for layer, head in ((0, 1), (1, 3)):
        maps = head_maps(model, row, layer, head)
        values = projected[layer][0].view(9, -1, 8)
        torch.testing.assert_close(maps.values, values[:, head * values.shape[1] // 4])
        torch.testing.assert_close(maps.output, mixed[layer][0].view(9, 4, 8)[:, head])
    norms = token_norms(model, row)
    assert norms.shape == (2, 9)
    torch.testing.assert_close(norms, torch.stack([x[0].abs().amax(dim=-1) for x in states]))
    shares = {(i, h): expected[i][0, h, 1:, 0].mean().item() for i in range(2) for h in range(4)}
    assert most_sinky_head(model, row) == max(shares, key=shares.__getitem__)


def test_the_first_of_equal_heads_is_chosen(tiny_llama: PreTrainedModel) -> None:
    model = eager(tiny_llama)
    with torch.no_grad():
        for block in decoder_blocks(model):
            block.self_attn.q_proj.weight.zero_()  # uniform attention in every head
    assert most_sinky_head(model, sequences(5)[0]) == (0, 0)


def test_token_norms_need_no_probabilities(tiny_llama: PreTrainedModel) -> None:
    (row,) = sequences(9)
    expected = token_norms(eager(tiny_llama), row)
    tiny_llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(token_norms(tiny_llama, row), expected)
