"""The papers' settings and their parameter counts, and that what they describe learns."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from adaptation_data import BASES, outlier_free
from sparq.adaptation import (
    LoraSettings,
    add_lora,
    lora_preset,
    trainable_parameters,
)
from sparq.errors import SparqError

SIZES = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "350m": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
}  # fmt: skip


def opt_shape(size: str) -> PreTrainedModel:
    shape = SIZES[size]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(OPTConfig(**shape, ffn_dim=4 * shape["hidden_size"]))


@pytest.mark.parametrize(
    ("size", "adapters", "nominal", "printed"),
    [
        ("125m", 9_437_184, 125e6, ("9.4M", "7.5%")),
        ("350m", 25_165_824, 350e6, ("25.2M", "7.2%")),
        ("1.3b", 50_331_648, 1.3e9, ("50.3M", "3.9%")),
    ],
)
def test_table_11(size: str, adapters: int, nominal: float, printed: tuple[str, str]) -> None:
    """SpARQ's table 11 counts adapters alone, and divides by the number in the model's name."""
    model = opt_shape(size)
    adapted = add_lora(model, lora_preset("table11", model))
    count = sum(p.numel() for name, p in trainable_parameters(adapted).items() if "lora_" in name)
    assert count == adapters
    assert (f"{count / 1e6:.1f}M", f"{count / nominal:.1%}") == printed


def test_the_papers_settings() -> None:
    model = opt_shape("350m")
    assert lora_preset("paper", model) == LoraSettings(rank=256, alpha=256, dropout=0.05)
    parameters = trainable_parameters(add_lora(model, lora_preset("paper", model)))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in parameters if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    others = {name.split(".")[-2] for name in parameters if ".lora_" not in name}
    assert others == {"embed_tokens", "project_in", "project_out"}  # the head is tied to the embedding
    count = sum(p.numel() for name, p in parameters.items() if ".lora_" in name)
    assert count == 24 * 256 * (4 * (1024 + 1024) + 2 * (1024 + 4096))
    with pytest.raises(SparqError, match="LoRA preset is 'table12': did you mean 'table11'"):
        lora_preset("table12", model)  # type: ignore[arg-type]


def trained_loss(settings: LoraSettings) -> tuple[float, float]:
    torch.manual_seed(0)
    model = add_lora(outlier_free("llama"), settings).train()
    adam = torch.optim.Adam(list(trainable_parameters(model).values()), lr=5e-3)
    losses = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        # Each token decides the next one.
        ids = (torch.randint(90, (8, 1), generator=generator) + 7 * torch.arange(16)) % 90
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


def test_qlora_learns_as_lora_does() -> None:
    settings = LoraSettings(rank=8, alpha=8, dropout=0.0)
    first, lora = trained_loss(settings)
    assert lora < 0.9 * first
    for base in BASES:
        _, loss = trained_loss(dataclasses.replace(settings, base=base))
        assert loss == pytest.approx(lora, rel=0.03)
