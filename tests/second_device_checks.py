"""What has to work on a GPU, on a second device that computes on the CPU; run by test_second_device.py."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import small_world
import sparq
from model_families import tiny_model
from second_device import DEVICE, SecondDevice, SecondTensor
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers
from sparq.evaluation.doctor import examine
from sparq.evaluation.perplexity import log_likelihoods, prose_perplexity
from sparq.evaluation.removed_mass import removed_mass
from sparq.models import converted_layers
from sparq.papers.norm_condition import measure_norm_condition
from sparq.quantization import QuantizationScheme, load_quantized, quantize_within, save_quantized, sensitivity
from sparq.quantization.integer_linear import IntegerLinear
from sparq.report import read_results
from sparq.tokens import Example

VARIANTS = (
    "vanilla",
    "softmax1",
    "max_shift",
    "learned_sink",
    "softmax1+clipped",
    "vanilla+gated",
    "gated_elementwise",
    "mean",
)
W4A4 = {"weight_bits": 4, "activation_bits": 4}
SCHEMES: tuple[dict[str, Any], ...] = (
    {"method": "rtn", **W4A4, "embedding_bits": 8},
    {"method": "rtn", **W4A4, "key_bits": 4, "value_bits": 4, "probability_bits": 8, "key_rotation": True},
    {"method": "rtn", **W4A4, "activation_static": "mse", "activation_granularity": "tensor"},
    {"method": "gptq", **W4A4, "activation_static": "percentile", "activation_granularity": "channel"},
    {"method": "smoothquant", **W4A4},
    {"method": "affinequant", **W4A4, "epochs": 1},
    {"method": "affinequant", "weight_bits": 4, "activation_bits": 16, "epochs": 1},
    {"method": "gptq", **W4A4, "group_size": 16},
    {"method": "omniquant", **W4A4, "epochs": 1},
    {"method": "rotation", **W4A4},
)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with SecondDevice():
        yield


def batches(model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, model.config.vocab_size, (2, 16)) for _ in range(2)]


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).to(DEVICE)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids.to(model.device)).logits
    return found.cpu()


def test_the_device_takes_no_tensors_of_the_cpu() -> None:
    x = torch.ones(2, device=DEVICE)
    assert isinstance(x, SecondTensor)
    assert (x + 1 + torch.tensor(1.0)).tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="on the CPU"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match="on the CPU"):
        x.add_(torch.ones(2))
    model = on_device(tiny_model("llama"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("family", "variant"),
    [*(("llama", variant) for variant in VARIANTS), ("opt", "softmax1"), ("gpt_neox", "softmax1")],
)
def test_attention_forward_and_backward(family: str, variant: str) -> None:
    here = sparq.convert(tiny_model(family), variant)
    there = on_device(here)
    ids = batches(here)[0]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for model in (here, there):
        on = model.device
        model(input_ids=ids.to(on), attention_mask=mask.to(on), labels=ids.to(on)).loss.backward()
    others = dict(there.named_parameters())
    for name, parameter in here.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(others[name].grad.cpu(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("llama", scheme) for scheme in SCHEMES),
        *(("opt", s) for s in SCHEMES if s["method"] in ("omniquant", "rotation")),
    ],
    ids=str,
)
def test_quantization(family: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    model = on_device(sparq.convert(tiny_model(family), "softmax1"))
    data = batches(model)
    settings = dict(scheme)
    if QuantizationScheme.from_dict(scheme).learns or QuantizationScheme.from_dict(scheme).compensates:
        settings["resume"] = tmp_path / "kept"
    first = sparq.quantize(model, data, **settings)
    again = sparq.quantize(model, data, **settings)
    assert all(tensor.device == DEVICE for tensor in first.state_dict().values())
    assert torch.equal(logits(first, data[0]), logits(again, data[0]))
    save_quantized(first, tmp_path / "saved")
    torch.testing.assert_close(logits(load_quantized(tmp_path / "saved"), data[0]), logits(first, data[0]))


@pytest.mark.parametrize("low_rank", [None, 2])
def test_best(low_rank: int | None, tmp_path: Path) -> None:
    model = on_device(tiny_model("llama"))
    data = batches(model)
    settings: dict[str, Any] = {
        "method": "best",
        **W4A4,
        "epochs": 1,
        "low_rank": low_rank,
        "resume": tmp_path / "kept",
    }
    first = sparq.quantize(model, data, **settings)
    assert torch.equal(logits(first, data[0]), logits(sparq.quantize(model, data, **settings), data[0]))


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_bits": 8, "activation_bits": 8, "activation_symmetric": False},
        {"weight_bits": 4, "activation_bits": 4, "group_size": 16, "weight_symmetric": False},
        {"weight_bits": 4, "activation_bits": 4, "group_size": 16, "activation_granularity": "group"},
        {"weight_bits": 4, "activation_bits": 8, "embedding_bits": 4},
    ],
    ids=lambda scheme: "-".join(map(str, scheme.values())),
)
def test_integers_have_the_simulated_accumulators(scheme: dict[str, Any]) -> None:
    simulated = sparq.quantize(on_device(tiny_model("llama")), method="rtn", **scheme)
    if "embedding_bits" in scheme:
        simulated = simulated.to(torch.bfloat16)
    integer = sparq.to_integers(copy.deepcopy(simulated))
    layers = [module for module in integer.modules() if isinstance(module, IntegerLinear)]
    assert len(layers) == 2 * 4
    ids = batches(simulated)[0]
    for inputs in (ids, ids[:1, :3]):  # more and fewer tokens than the kernel takes
        bound = 0.05 if "embedding_bits" in scheme else 1e-3
        expected = logits(simulated, inputs).float()
        assert (logits(integer, inputs).float() - expected).norm() < bound * expected.norm()
    down = simulated.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, down.in_features, device=DEVICE)
    exact = down.accumulators(x).permute(2, 0, 1).cpu()
    assert torch.equal(integer.get_submodule("model.layers.0.mlp.down_proj").accumulators(x).cpu(), exact)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_weights_alone(bits: int, group: int | None) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)  # fmt: skip
    settings = {"weight_bits": bits, "activation_bits": 16, "group_size": group, "embedding_bits": bits}
    quantized = sparq.quantize(model, method="rtn", **settings)
    there = sparq.to_integers(copy.deepcopy(quantized).to(DEVICE))
    ids = batches(model)[0][:1]
    expected = logits(quantized, ids).float()
    assert (logits(there, ids).float() - expected).norm() < 0.02 * expected.norm()
    if bits == 4:
        with pytest.raises(SparqError, match="not packed for second:0"):
            logits(sparq.to_integers(quantized).to(DEVICE), ids)


def test_sizes_that_a_gpu_lacks_are_refused() -> None:
    model = on_device(tiny_model("llama"))
    with pytest.raises(SparqError, match="multiples of 8"):
        sparq.to_integers(sparq.quantize(model, method="rtn", weight_bits=8, activation_bits=8, group_size=4))


def test_sensitivity_and_mixed_bits() -> None:
    model = on_device(tiny_model("llama"))
    data = batches(model)
    scheme = QuantizationScheme.from_dict({"method": "rtn", "weight_bits": 4, "activation_bits": 16})

    def measure(other: PreTrainedModel) -> dict[str, float]:
        return {"text": prose_perplexity(other, data[0].flatten(), context=16).value}

    report = sensitivity(model, data, scheme, measure, by="kind")
    assert report.parts
    found = quantize_within(model, data, scheme, measure, budget=0.5, better={"weight_bits": 8}, by="kind")
    assert found.model.device == DEVICE


def test_instruments() -> None:
    here = sparq.convert(tiny_model("llama"), "vanilla")
    there = on_device(here)
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches(here)]
    examples = [
        Example(task="textlm", prompt=(1, 2), target=(3, 4)),
        Example(task="asr", prompt=(1,), target=(5,)),
    ]
    groups = {"low": torch.arange(96) < 50, "high": torch.arange(96) >= 50}
    for measure in (
        lambda model: measure_outliers(model, data, groups=groups, modules=True).max_inf_norm,
        lambda model: measure_outliers(model, data, compat="outeffhop").max_inf_norm,
        lambda model: removed_mass(model, data, ["softmax1", "learned_sink"]).mass.mean(),
        lambda model: measure_norm_condition(model, data)[0].key_norm,
        lambda model: prose_perplexity(model, data[0]["input_ids"].flatten(), context=16).value,
        lambda model: sum(log_likelihoods(model, examples, batch_size=2)),
    ):
        assert float(measure(there)) == pytest.approx(float(measure(here)), rel=1e-4)
    assert [f.what for f in examine(there, data[0]["input_ids"][0])] == [
        f.what for f in examine(here, data[0]["input_ids"][0])
    ]
    assert len(converted_layers(there)) == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    small_world.make_corpus(folder / "corpus")
    small_world.make_backbone(folder / "backbone")
    (folder / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 150)
    return folder


def test_a_whole_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, quantize, measure and report there; transcribe and go on with the model."""
    recipe = small_world.write_recipe(
        tmp_path / "recipe.yaml", world / "corpus" / "manifest.tsv", world / "backbone",
        frameworks=["softmax1"],
        **{
            # Each device draws its own dropout.
            "train.dropout": 0.0, "train.dtype": "float32", "quantize.schemes": ["w4a4-smoothquant"],
            "evaluate.prose": str(world / "prose.txt"),
        },
    )  # fmt: skip
    assert main(["run", str(recipe), "--out", str(tmp_path / "here")]) == 0
    for module in list(sys.modules.values()):
        if getattr(module, "compute_device", None) is not None:
            monkeypatch.setattr(module, "compute_device", lambda: DEVICE)
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda _: DEVICE))
    used: set[tuple[str, str]] = set()
    call = PreTrainedModel.__call__

    def noted(model: PreTrainedModel, *args: Any, **kwargs: Any) -> object:
        used.add((str(model.device), "training" if torch.is_grad_enabled() else "not training"))
        return call(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "__call__", noted)
    assert main(["run", str(recipe), "--out", str(tmp_path / "there")]) == 0
    rows = [read_results(tmp_path / name / "results.json").rows for name in ("here", "there")]
    for here, there in zip(*rows, strict=True):
        for metric in ("textlm_ppl", "speechlm_ppl", "prose_ppl"):
            assert getattr(there, metric).value == pytest.approx(getattr(here, metric).value, rel=1e-2), metric
    logs = [next((tmp_path / name).rglob("train.jsonl")).read_text() for name in ("here", "there")]
    here, there = ([json.loads(line)["loss"] for line in log.splitlines()] for log in logs)
    assert there == pytest.approx(here, rel=1e-3)
    model = str(tmp_path / "there" / "models" / "softmax1")
    wav = str(world / "corpus" / "0.wav")
    assert main(["transcribe", wav, "--model", model]) == 0
    assert (
        main(["continue", "--text", "red lamp", "--model", model, "--precision", "w4a4-smoothquant", "--max-new", "5"])
        == 0
    )
    assert "red lamp" in capsys.readouterr().out
    assert used == {(str(DEVICE), "training"), (str(DEVICE), "not training")}
