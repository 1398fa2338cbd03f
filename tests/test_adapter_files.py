"""Model folders of adapted models: what is loaded is what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import small_world
from adaptation_data import BASES, CASES, data, relative
from sparq.adaptation import (
    LoraSettings,
    SpeechLMDescription,
    add_lora,
    load_speechlm,
    save_speechlm,
    trainable_parameters,
)
from sparq.adaptation.initialization import adapted_layers, removed_parts
from sparq.adaptation.lora import quiet_peft
from sparq.adaptation.quantized_base import frozen, round_base
from sparq.errors import SparqError
from sparq.models import load_backbone
from sparq.models.conversion import attention_parameters
from sparq.models.speechlm import build_speechlm, replace_vocabulary
from sparq.tokens import JointVocabulary, fit_vocabulary
from sparq.tokens.special import units_to_text
from sparq.tokens.vocabulary import as_line


@pytest.fixture(scope="module")
def vocabulary() -> JointVocabulary:
    lines = [as_line("red lamp open the green door")] * 4 + [units_to_text([0, 1, 2, 3, 4, 5, 6, 7])] * 4
    return fit_vocabulary(lines, size=50, num_units=8, units_fingerprint="units", model_type="bpe")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {
        name: small_world.make_backbone(folder / name, family)
        for name, family in {"llama": "llama", "opt_350m": "opt-post-norm"}.items()
    }


def updated(model: PeftModel) -> None:
    """Move every trained parameter as training would, by noise of a tenth of its size."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) + 0.01 * torch.randn_like(parameter))


def saved(
    folder: Path, backbone: Path, vocabulary: JointVocabulary, settings: LoraSettings,
    dtype: torch.dtype | None = None, attention: str = "softmax1",
) -> PeftModel:  # fmt: skip
    """Adapt, change and save a model; return it in memory."""
    loaded, _ = build_speechlm(str(backbone), vocabulary, attention=attention)
    model = add_lora(loaded.model, settings, batches=data())
    updated(model)
    kmeans = folder.parent / "kmeans.safetensors"
    kmeans.write_bytes(b"")
    description = SpeechLMDescription(
        backbone=str(backbone), backbone_checksum=loaded.checksum, attention=attention,
        method="lora" if settings.base is None else "qlora", base=settings.base, training={},
        vocabulary_fingerprint=vocabulary.fingerprint, units_fingerprint="units",
    )  # fmt: skip
    save_speechlm(folder, model, vocabulary=vocabulary, kmeans_file=kmeans, description=description, dtype=dtype)
    return model.eval()


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_what_is_loaded_is_what_was_trained(
    tmp_path: Path, backbones: dict[str, Path], vocabulary: JointVocabulary, family: str, changes: dict[str, Any]
) -> None:
    settings = LoraSettings(rank=4, alpha=6, **changes)
    trained = saved(tmp_path / "model", backbones[family], vocabulary, settings)
    loaded = load_speechlm(tmp_path / "model")
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        assert relative(loaded.model(ids).logits, expected) < 1e-5
    assert loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert (tmp_path / "model" / "base.safetensors").exists() == (settings.base is not None)
    if settings.base is not None:
        (tmp_path / "model" / "base.safetensors").rename(tmp_path / "kept")
        with pytest.raises(SparqError, match=r"no such file: .*base\.safetensors"):
            load_speechlm(tmp_path / "model")
    # PEFT by itself, on the backbone that the adapters are of.
    plain = load_backbone(str(backbones[family]), attention="softmax1").model
    replace_vocabulary(plain, vocabulary, loaded.model.get_input_embeddings().weight.detach())
    for name in ("project_in", "project_out"):
        if hasattr(plain.get_decoder(), name) and getattr(plain.get_decoder(), name) is not None:
            getattr(plain.get_decoder(), name).load_state_dict(getattr(loaded.model.get_decoder(), name).state_dict())
    if settings.base is not None:
        round_base(plain, settings.base, removed_parts(trained))
    with quiet_peft():
        peft = PeftModel.from_pretrained(plain, tmp_path / "model" / "adapter")
    with torch.no_grad():
        assert relative(peft.eval()(input_ids=ids).logits, expected) < 1e-5


def test_files_in_bfloat16_keep_the_difference_from_the_start(
    tmp_path: Path, backbones: dict[str, Path], vocabulary: JointVocabulary
) -> None:
    """PiSSA's adapters less their start are small beside either, and are not cast."""
    settings = LoraSettings(rank=8, alpha=8, initialization="pissa")
    trained = saved(tmp_path / "model", backbones["llama"], vocabulary, settings, torch.bfloat16)
    loaded = load_speechlm(tmp_path / "model")
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        assert relative(loaded.model(ids).logits, trained(input_ids=ids).logits) < 5e-3


def test_bfloat16_is_computed_in_and_float32_rounded_from(
    backbones: dict[str, Path], vocabulary: JointVocabulary
) -> None:
    """The base is that of the float32 weights, whatever the model computes in."""
    for base in BASES:
        plain, _ = build_speechlm(str(backbones["llama"]), vocabulary, attention="vanilla")
        loaded, _ = build_speechlm(str(backbones["llama"]), vocabulary, attention="vanilla")
        model = add_lora(loaded.model, LoraSettings(rank=2, base=base), dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
        assert model(input_ids=torch.randint(3, 50, (2, 9))).logits.dtype == torch.bfloat16
        for name, layer in adapted_layers(model):
            expected = frozen(plain.model.get_submodule(name).weight, base).dequantized()
            assert torch.equal(layer.get_base_layer().dequantized(), expected)


@pytest.mark.parametrize("attention", ["learned_sink", "softmax1+gated_mlp"])
@pytest.mark.parametrize(
    "changes", [{}, {"initialization": "pissa", "dora": True}, {"base": "nf4"}], ids=["lora", "pissa", "nf4"]
)
def test_sinks_and_gates_are_trained_and_saved(
    vocabulary: JointVocabulary, backbones: dict[str, Path], tmp_path: Path, attention: str, changes: dict[str, Any]
) -> None:
    folder, settings = tmp_path / "model", LoraSettings(rank=2, alpha=4, dropout=0.0, **changes)
    model = saved(folder, backbones["llama"], vocabulary, settings, attention=attention)
    own = attention_parameters(model.get_base_model())
    assert len(own) == 2 * (1 if attention == "learned_sink" else 4)
    assert {id(p) for p in own.values()} <= {id(p) for p in trainable_parameters(model).values()}
    again = load_speechlm(folder).model
    assert all(torch.equal(value, own[name]) for name, value in attention_parameters(again).items())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        assert relative(again(ids).logits, model(input_ids=ids).logits) < 1e-4
        for parameter in own.values():
            parameter.zero_()
        assert relative(again(ids).logits, model(input_ids=ids).logits) > 1e-3
    (folder / "attention.safetensors").unlink()
    with pytest.raises(SparqError, match=r"no such file: .*attention.safetensors"):
        load_speechlm(folder)


def test_a_sink_is_float32_in_any_model(vocabulary: JointVocabulary, backbones: dict[str, Path]) -> None:
    loaded, _ = build_speechlm(str(backbones["llama"]), vocabulary, attention="learned_sink+gated")
    add_lora(loaded.model, LoraSettings(rank=2), dtype=torch.bfloat16)
    for name, parameter in attention_parameters(loaded.model).items():
        assert parameter.dtype == (torch.float32 if name.endswith(".sink") else torch.bfloat16), name
