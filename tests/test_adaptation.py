"""Low-rank adaptation on float and quantized bases: layers, starts, variants, presets, and the files."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

import small_world
from model_families import tiny_model
from sparq.adaptation import (
    LoraSettings,
    SpeechLMDescription,
    add_lora,
    load_speechlm,
    lora_preset,
    save_speechlm,
    trainable_parameters,
)
from sparq.adaptation.initialization import adapted_layers, removed_parts
from sparq.adaptation.loftq import loftq, truncated_svd
from sparq.adaptation.lora import quiet_peft
from sparq.adaptation.quantized_base import frozen, round_base
from sparq.adaptation.settings import Base
from sparq.data import IGNORE, Batch
from sparq.errors import SparqError
from sparq.models import load_backbone
from sparq.models.conversion import convert
from sparq.models.families import named_linears
from sparq.models.speechlm import build_speechlm, replace_vocabulary
from sparq.tokens import JointVocabulary, fit_vocabulary
from sparq.tokens.special import units_to_text
from sparq.tokens.vocabulary import as_line

BASES: tuple[Base, ...] = ("int8", "nf4", "nf4-double")
CASES = [
    ("opt_350m", {}), ("opt_350m", {"initialization": "pissa", "dora": True}), ("opt_350m", {"initialization": "eva"}),
    ("opt_350m", {"base": "int8"}), ("opt_350m", {"base": "nf4", "initialization": "loftq"}),
    ("llama", {"dora": True}), ("llama", {"rslora": True, "initialization": "pissa"}),
    ("llama", {"initialization": "olora"}), ("llama", {"base": "int8", "dora": True}),
    ("llama", {"base": "int8", "initialization": "loftq", "dora": True}),
    ("llama", {"base": "nf4", "initialization": "eva"}), ("llama", {"base": "nf4-double", "dora": True}),
    ("llama", {"base": "nf4-double", "initialization": "loftq", "rslora": True}),
]  # fmt: skip
"""Every base, start and variant, and the combinations that go separate ways."""


def data(num: int = 3) -> list[Batch]:
    """Batches whose first tokens are prompts."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(num):
        ids = torch.randint(5, 50, (8, 20), generator=generator)
        labels = ids.clone()
        labels[:, :4] = IGNORE
        batches.append(Batch(input_ids=ids, labels=labels, num_targets=8 * 16, lengths=(ids.shape[1],) * len(ids)))
    return batches


def outlier_free(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    convert(model, "softmax1")
    return model


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


# --- frozen layers


def normal_float_codes() -> Tensor:
    """QLoRA's 16 levels: quantiles of N(0, 1), 8 above zero and 7 below it, zero itself, scaled to [-1, 1]."""
    edge = 0.9677083  # between 1 - 1/30 and 1 - 1/32: the outermost quantiles are not infinite
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return codes / codes.abs().max()


def test_nf4_takes_the_nearest_quantile() -> None:
    weight = torch.randn(48, 128)
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = normal_float_codes()
    nearest = codes[(blocks / largest).unsqueeze(-1).sub(codes).abs().argmin(-1)] * largest
    torch.testing.assert_close(frozen(weight, "nf4").dequantized().double().view(-1, 64), nearest, atol=1e-5, rtol=1e-5)
    double = frozen(weight, "nf4-double").dequantized()
    # Scales in 8 bits: a percent of a weight, where a level of NF4 is far more.
    assert 0 < relative(double, frozen(weight, "nf4").dequantized()) < 0.01


def test_int8_takes_the_nearest_of_255_steps() -> None:
    weight = torch.randn(48, 128)
    step = weight.abs().amax(1, keepdim=True) / 127
    # bitsandbytes rounds to float16 first, 2^-11 of a weight, so that ties may fall to either side.
    error = (frozen(weight, "int8").dequantized() - weight).abs()
    assert (error <= step / 2 + weight.abs() * 2**-10 + step * 127 * 2**-10).all()
    assert error.max() > step.min() / 3


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_is_one_function_with_a_gradient(base: Base, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(64, 128), torch.randn(64)
    layer = frozen(weight, base, bias.to(dtype))
    x = torch.randn(2, 5, 128, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    expected = functional.linear(x.float(), layer.dequantized(), bias.to(dtype).float())
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert relative(evaluated.float(), expected) < tolerance
    # bitsandbytes' own layers give no gradient, or another output, once they were evaluated.
    seen = x.clone().requires_grad_()
    trained = layer.train()(seen)
    assert torch.equal(trained, evaluated)
    upstream = torch.randn_like(trained)
    trained.backward(upstream)
    assert seen.grad is not None
    assert relative(seen.grad.float(), upstream.float() @ layer.dequantized()) < tolerance


@pytest.mark.parametrize(("base", "most"), [("int8", 0.55), ("nf4", 0.35), ("nf4-double", 0.35)])
def test_memory_of_a_frozen_layer(base: Base, most: float) -> None:
    """At SmolLM2's width, scales included, against bfloat16."""
    layer = frozen(torch.randn(576, 576), base)
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert 576 * 576 * 2 * (0.25 if base != "int8" else 0.5) < size < 576 * 576 * 2 * most


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparq.adaptation.quantized_base.find_spec", lambda name: None)
    with pytest.raises(SparqError, match=r"a base in nf4 needs bitsandbytes: pip install 'sparq\[qlora\]'"):
        add_lora(tiny_model("llama"), LoraSettings(rank=2, base="nf4"))


# --- starts


@pytest.mark.parametrize(("family", "changes"), [*CASES, ("gpt_neox", {"base": "nf4"}), ("opt", {"base": "int8"})])
def test_training_starts_from_the_base(family: str, changes: dict[str, Any]) -> None:
    """At first an adapted model is what its base is, but for LoftQ's, which is nearer to the float model."""
    settings = LoraSettings(rank=4, alpha=6, dropout=0.0, **changes)
    base = settings.base
    batch = data(1)[0].input_ids
    rounded, reference = outlier_free(family), outlier_free(family)
    if base is not None:
        round_base(rounded, base, {})
    adapted = add_lora(outlier_free(family), settings, batches=data())
    with torch.no_grad():
        expected, original = rounded(batch).logits, reference(batch).logits
        logits = adapted.eval()(input_ids=batch).logits
    if settings.initialization == "loftq":
        for name, layer in adapted_layers(adapted):
            weight = reference.get_submodule(name).weight
            left = layer.get_base_layer().dequantized() + layer.get_delta_weight("default") - weight
            assert left.norm() < 0.95 * (frozen(weight, base).dequantized() - weight).norm(), name
        assert relative(logits, original) < relative(expected, original)
    else:
        assert relative(logits, expected) < 1e-5
    adapted.train()(input_ids=batch).logits.square().mean().backward()
    parameters = trainable_parameters(adapted)
    assert all(parameter.grad is not None for parameter in parameters.values())
    # Kaiming's and EVA's A get no gradient before B has moved.
    assert all(parameters[name].grad.any() for name in parameters if "lora_B" in name or "embed" in name)
    assert sum("magnitude" in name for name in parameters) == (
        len(list(adapted_layers(adapted))) if settings.dora else 0
    )


@pytest.mark.parametrize("base", BASES)
def test_one_round_of_loftq_is_a_truncated_svd(base: Base) -> None:
    weight = torch.randn(48, 64)
    start = loftq(weight, rank=8, base=base, iterations=1)
    assert start.removed is None
    error = weight - frozen(weight, base).dequantized()
    tail = torch.linalg.svdvals(error.double())[8:].norm()
    assert float((error - start.added.product).norm()) == pytest.approx(float(tail), rel=1e-4)
    more = loftq(weight, rank=8, base=base, iterations=5)
    assert more.removed is not None
    left = weight - frozen(weight - more.removed.product, base).dequantized() - more.added.product
    assert left.norm() <= tail * 1.001


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)])
def test_truncated_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    part = truncated_svd(matrix, 6)
    assert relative(part.product.double(), left[:, :6] * singular[:6] @ right[:6]) < 1e-5
    torch.testing.assert_close(part.a.norm(dim=1), part.b.norm(dim=0))
    assert not truncated_svd(torch.zeros(shape), 6).product.any()


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_and_olora_against_their_definitions(rslora: bool) -> None:
    scaling = 6 / 2 if rslora else 6 / 4
    for start in ("pissa", "olora"):
        model = outlier_free("llama")
        weights = {name: linear.get_parameter("weight").detach().double() for name, linear in named_linears(model)}
        settings = LoraSettings(rank=4, alpha=6, dropout=0.0, initialization=start, rslora=rslora)
        assert settings.scaling == scaling
        adapted = add_lora(model, settings)
        for name, layer in adapted_layers(adapted):
            update = layer.get_delta_weight("default").detach().double()
            if start == "pissa":
                left, singular, right = torch.linalg.svd(weights[name])
                expected = left[:, :4] * singular[:4] @ right[:4]
            else:
                q, r = torch.linalg.qr(weights[name])
                expected = scaling * q[:, :4] @ r[:4]
            assert relative(update, expected) < 1e-5
            assert relative(layer.get_base_layer().weight.detach().double() + update, weights[name]) < 1e-5


def test_eva_spans_what_the_inputs_vary_in() -> None:
    model, batches = outlier_free("opt_350m"), data(4)
    inputs: dict[str, list[Tensor]] = {name: [] for name, _ in named_linears(model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
        for name, layer in named_linears(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch.input_ids)
    for handle in handles:
        handle.remove()
    # The last batch of an epoch, with fewer target tokens than the rank.
    small = Batch(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[IGNORE, 6]]), num_targets=1, lengths=(2,))
    counted = torch.cat([(batch.labels != IGNORE).flatten() for batch in batches])
    adapted = add_lora(model, LoraSettings(rank=4, initialization="eva"), batches=[*batches, small])
    for name, layer in adapted_layers(adapted):
        seen = torch.cat(inputs[name])[counted]
        seen = seen - seen.mean(0)
        basis = layer.lora_A["default"].weight
        torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-3, rtol=0)
        best = torch.linalg.svdvals(seen)[:4].square().sum()
        # PEFT's sums are incremental and its SVD is random: near the best that four directions can do.
        assert (seen @ basis.T).square().sum() > 0.97 * best, name


def test_starting_twice_gives_the_same_base() -> None:
    """A run that goes on makes its base again; only what is trained is in its checkpoint."""
    for base, start in ((None, "pissa"), (None, "olora"), ("nf4-double", "loftq"), ("int8", "loftq")):
        settings = LoraSettings(rank=4, base=base, initialization=start)
        first, second = (dict(add_lora(outlier_free("llama"), settings).state_dict()) for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_mistakes() -> None:
    model = tiny_model("llama")

    def settings(**changes: object) -> LoraSettings:
        return LoraSettings(rank=2, **changes)  # type: ignore[arg-type]

    for changes, message in (
        ({"dropout": 1.0}, "LoRA dropout is 1.0: expected at least 0 and less than 1"),
        ({"alpha": 0}, "LoRA alpha is 0: expected at least 1"),
        ({"initialization": "pisa"}, "LoRA initialization is 'pisa': did you mean 'pissa'"),
        ({"base": "nf5"}, "LoRA base is 'nf5': did you mean 'nf4'"),
        ({"initialization": "loftq"}, "'loftq' makes up for a quantized base: expected a base, int8 or nf4"),
        ({"initialization": "olora", "base": "int8"}, "'olora' is for a base in floating point, not 'int8'"),
        ({"initialization": "eva"}, "needs training batches of as many target tokens as the rank, 2; the largest of 0"),
    ):
        with pytest.raises(SparqError, match=message):
            add_lora(model, settings(**changes))
    short = Batch(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[IGNORE, 6]]), num_targets=1, lengths=(2,))
    with pytest.raises(SparqError, match="as the rank, 2; the largest of 1 has 1: give larger ones, or lower the rank"):
        add_lora(tiny_model("llama"), settings(initialization="eva"), batches=[short])
    for changes in ({"base": "nf4"}, {"initialization": "pissa"}):
        with pytest.raises(
            SparqError, match="need a model in float32, not torch.bfloat16: load it so, and give `dtype`"
        ):
            add_lora(tiny_model("llama").bfloat16(), settings(**changes))


# --- the papers' settings

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


# --- files


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
    folder: Path, backbone: Path, vocabulary: JointVocabulary, settings: LoraSettings, dtype: torch.dtype | None = None
) -> PeftModel:
    """Adapt, change and save a model; return it in memory."""
    loaded, _ = build_speechlm(str(backbone), vocabulary, attention="softmax1")
    model = add_lora(loaded.model, settings, batches=data())
    updated(model)
    kmeans = folder.parent / "kmeans.safetensors"
    kmeans.write_bytes(b"")
    description = SpeechLMDescription(
        backbone=str(backbone), backbone_checksum=loaded.checksum, attention="softmax1",
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


# --- training


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
