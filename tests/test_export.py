"""Exported models against sparq's own, loaded by transformers alone; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from model_families import FAMILIES, logits, tiny_model
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.models import convert
from sparq.quantization import export_compressed_tensors, quantize, save_quantized, to_integers

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # those of the reader


def loaded(folder: Path) -> PreTrainedModel:
    model, account = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(account.values()), account
    return model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral"])
@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("pack-quantized", {"weight_bits": 4, "activation_bits": 16, "group_size": 16}),
        ("int-quantized", {"weight_bits": 8, "activation_bits": 8, "activation_symmetric": False}),
    ],
)
def test_transformers_computes_the_same(family: str, layout: str, settings: dict[str, object], tmp_path: Path) -> None:
    quantized = quantize(tiny_model(family), method="rtn", **settings)
    export_compressed_tensors(quantized, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == layout
    ids = torch.randint(3, 96, (2, 16))
    ours, theirs = logits(quantized, ids), logits(loaded(tmp_path / "out"), ids)
    # Ties of zero points round otherwise, one step of 8 bits.
    assert (ours - theirs).norm() <= (1e-6 if layout == "pack-quantized" else 0.01) * ours.norm()
    assert logits(quantized, ids).norm() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 3, "activation_bits": 16},
        {"weight_bits": 4, "activation_bits": 4, "activation_symmetric": False},
        {"weight_bits": 8, "activation_bits": 16},
        {"weight_bits": 8, "activation_bits": 6, "weight_symmetric": False, "activation_symmetric": False},
        {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8, "activation_granularity": "tensor",
         "activation_symmetric": False},
    ],
)  # fmt: skip
def test_bits_and_groups(settings: dict[str, object], tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (2, 16))
    quantized = quantize(tiny_model("llama"), [ids], **{"method": "rtn", **settings})
    export_compressed_tensors(quantized, tmp_path / "out")
    ours, theirs = logits(quantized, ids), logits(loaded(tmp_path / "out"), ids)
    assert (ours - theirs).norm() <= 1e-6 * ours.norm()


def test_symmetric_activations_are_as_close_as_their_step(tmp_path: Path) -> None:
    """The reader's step is max / 127.5: another rounding of the same inputs, no further from the float model."""
    model, ids = tiny_model("llama"), torch.randint(3, 96, (2, 16))
    quantized = quantize(model, method="rtn", weight_bits=8, activation_bits=8)
    export_compressed_tensors(quantized, tmp_path / "out")
    ours, theirs, exact = logits(quantized, ids), logits(loaded(tmp_path / "out"), ids), logits(model, ids)
    assert 0 < (ours - theirs).norm() < 1.5 * (ours - exact).norm()
    assert (theirs - exact).norm() < 1.5 * (ours - exact).norm()


def test_untied_weights_stay_untied(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    settings = {"method": "rtn", "weight_bits": 8, "activation_bits": 16}
    export_compressed_tensors(quantize(tiny_llama, **settings), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    tiny_llama.lm_head.weight = torch.nn.Parameter(torch.randn_like(tiny_llama.lm_head.weight))
    quantized = quantize(tiny_llama, **settings)
    export_compressed_tensors(quantized, tmp_path / "untied")
    ids = torch.randint(3, 96, (2, 16))
    torch.testing.assert_close(logits(loaded(tmp_path / "untied"), ids), logits(quantized, ids), rtol=0, atol=1e-6)


def test_vanilla_models_are_exported_without_sparq_in_their_config(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    quantized = quantize(convert(tiny_llama, "vanilla"), method="rtn", weight_bits=4, activation_bits=16)
    export_compressed_tensors(quantized, tmp_path / "out")
    assert "sparq" not in (tmp_path / "out" / "config.json").read_text()
    ids = torch.randint(3, 96, (2, 16))
    assert (logits(quantized, ids) - logits(loaded(tmp_path / "out"), ids)).norm() < 1e-5


def test_what_the_format_lacks_is_refused(tiny_opt_post_norm: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (2, 16))

    def made(family: str = "llama", **settings: object) -> PreTrainedModel:
        defaults = {"method": "rtn", "weight_bits": 8, "activation_bits": 8}
        return quantize(tiny_model(family), [ids], **{**defaults, **settings})

    softmax1 = quantize(convert(tiny_model("llama"), "softmax1"), method="rtn", weight_bits=8, activation_bits=8)
    cases = [
        (tiny_model("llama"), "is not quantized"),
        (to_integers(made()), "export it before to_integers"),
        (softmax1, "attention is 'softmax1', and transformers would load it with the plain softmax"),
        (made("opt_350m", method="smoothquant"), r"input of .*q_proj has a division by input_scale"),
        (
            made(activation_bits=4),
            r"symmetric activations of 4 bits have another step in compressed-tensors, by 6\.7 %",
        ),
        (made(weight_bits=4, weight_symmetric=False), "does not load packed zero points"),
        (made(weight_bits=16), "weight_bits is 16: there are no integers to export"),
        (made(embedding_bits=8), "embedding_bits is 8: export needs 16"),
        (made(activation_clip=0.9), "has clipping, which compressed-tensors does not represent"),
    ]
    for model, message in cases:
        with pytest.raises(SparqError, match=message) as caught:
            export_compressed_tensors(model, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_the_command(tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized = quantize(tiny_llama, method="rtn", weight_bits=8, activation_bits=16)
    save_quantized(quantized, tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    ids = torch.randint(3, 96, (1, 5))
    assert torch.allclose(logits(loaded(tmp_path / "out"), ids), logits(quantized, ids), atol=1e-6)
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err
    assert "out exists: choose a folder that does not" in errors
    assert "has no quantization.json" in errors
