"""`sparq quantize` of any model and `sparq perplexity`: what they write, print and refuse."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from small_world import make_backbone
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import prose_perplexity
from sparq.models import load_model
from sparq.quantization import QuantizationScheme, load_quantized, quantize, scheme_of, sensitivity
from sparq.quantization.names import settings_of_name

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("sparq: error: ").strip()


def pieces(backbone: Path, tokens: int, context: int) -> list[torch.Tensor]:
    ids = AutoTokenizer.from_pretrained(backbone)(" ".join(TEXT.split()), return_tensors="pt").input_ids
    return list(ids[:, :tokens].split(context, dim=1))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--scheme", "w4a4-rotation", "--seed", "3"], {"method": "rotation", "seed": 3}),
        (["--method", "gptq", "--weight-bits", "4", "--activation-bits", "4"], {"method": "gptq"}),
        (["--scheme", "w4a4g16-gptq", "--set", "gptq_damping=0.02"],
         {"method": "gptq", "group_size": 16, "gptq_damping": 0.02}),
    ],
)  # fmt: skip
def test_quantize_writes_what_the_library_makes(
    backbone: Path, text: Path, tmp_path: Path, options: list[str], settings: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "low"
    calibration = [
        "--calibration",
        str(text),
        "--tokens",
        "96",
        "--context",
        "32",
        "--resume",
        str(tmp_path / "blocks"),
    ]
    assert main(["quantize", str(backbone), "--out", str(out), "--attention", "softmax1", *options, *calibration]) == 0
    scheme = QuantizationScheme.from_dict({"weight_bits": 4, "activation_bits": 4, **settings})
    assert (
        capsys.readouterr().out == f"{out}\t{scheme.name}\t{(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB\n"
    )
    expected = quantize(load_model(str(backbone), "softmax1"), pieces(backbone, 96, 32), scheme)
    loaded = load_quantized(out)
    assert scheme_of(loaded) == scheme
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == AutoTokenizer.from_pretrained(backbone)(TEXT).input_ids


def test_perplexity_is_the_mean_over_windows(
    backbone: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "low"
    assert main(["quantize", str(backbone), "--out", str(out), "--scheme", "w8a8-rtn"]) == 0
    capsys.readouterr()
    measured = ["--text", str(text), "--tokens", "70", "--context", "30"]
    assert main(["perplexity", str(backbone), str(out), *measured]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(backbone), str(out)]
    for line, model in zip(lines, (load_model(str(backbone)), load_quantized(out)), strict=True):
        losses = []
        for piece in pieces(backbone, 70, 30):
            with torch.no_grad():
                logits = model(piece).logits[0, :-1].double()
            losses += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none").tolist()
        assert int(line[2]) == len(losses) == 67
        assert float(line[1]) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert main(["perplexity", str(out), "--integers", *measured]) == 0
    assert float(capsys.readouterr().out.split("\t")[1]) == pytest.approx(float(lines[1][1]), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scheme w4a4rotation", "'w4a4rotation' is not a scheme: expected for example w4a4-rotation"),
        ("--scheme w4a4-rotaton", "unknown quantization method 'rotaton': did you mean 'rotation'"),
        ("--scheme w9a4-rtn", "weight_bits is 9; it must be 2 to 8, or 16"),
        ("--scheme w4a4-gptq", "w4a4-gptq needs calibration data: give a text with --calibration FILE"),
        ("--scheme w4a4-rtn --calibration TEXT", "w4a4-rtn reads no calibration data: leave --calibration out"),
        ("--scheme w4a4-rtn --method rtn", "method is given twice, as 'rtn' and as 'rtn'"),
        ("--method rtn --weight-bits 4", "the quantization setting 'activation_bits' is missing"),
        ("--scheme w4a4-rtn --set weigth_range=mse", "unknown quantization setting 'weigth_range': did you mean"),
        ("--scheme w4a4g7-rtn", "group_size 7 does not divide the 32 input features of model.layers.0.self_attn"),
        ("--scheme w4a4-gptq --calibration nothing.txt", "no such file: nothing.txt"),
        ("--scheme w4a4-gptq --calibration EMPTY", "EMPTY has 0 tokens: give 2 or more"),
        ("--scheme w4a4-gptq --calibration TEXT", "TEXT has 439 tokens, fewer than the 16384 of --tokens"),
        ("--scheme w4a4-gptq --calibration TEXT --context 1", "--context is 1: it must be 2 or more"),
        ("--scheme w4a4-rtn --attention sofmax1", "unknown attention 'sofmax1': did you mean 'softmax1'?"),
        ("--scheme w4a4-rtn --skip-bad", "--skip-bad is for a recipe"),
        ("--scheme w4a4-rtn --resume blocks", "w4a4-rtn is done in seconds"),
        ("--scheme w4a4-rtn --seed -1", "argument --seed: "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_no_folder(
    backbone: Path, text: Path, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"TEXT": str(text), "EMPTY": str(tmp_path / "empty.txt")}
    words = [places.get(word, word) for word in options.split()]
    for name, place in places.items():
        message = message.replace(name, place)
    assert error_of(capsys, "quantize", backbone, "--out", tmp_path / "low", *words).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt"]


def test_other_mistakes(backbone: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rtn = ["--scheme", "w4a4-rtn"]
    assert error_of(capsys, "quantize", backbone, "--out", tmp_path, *rtn).startswith(f"{tmp_path} exists: choose")
    low = tmp_path / "low"
    assert main(["quantize", str(backbone), "--out", str(low), *rtn]) == 0
    capsys.readouterr()
    message = error_of(capsys, "quantize", low, "--out", tmp_path / "lower", *rtn)
    assert message.startswith(f"{low} is quantized already: start from")
    assert error_of(capsys, "quantize", "recipe.yaml", "--out", tmp_path / "x", *rtn).startswith(
        "--scheme is for a model"
    )
    assert error_of(capsys, "perplexity", backbone, "--integers").endswith("folder that sparq quantize wrote")
    assert error_of(capsys, "perplexity", low, "--attention", "softmax1").endswith("leave --attention out")
    assert error_of(capsys, "quantize", tmp_path / "none", "--out", tmp_path / "x", *rtn).startswith("no model folder")
    half = tmp_path / "half"
    assert main(["quantize", str(backbone), "--out", str(half), "--scheme", "w4a16-rtn"]) == 0
    capsys.readouterr()
    assert "activations of 16 bits, which are computed in bfloat16" in error_of(
        capsys, "perplexity", half, "--integers"
    )


def test_a_tokenizer_of_another_model(
    text: Path, tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(small)
    capsys.readouterr()
    options = ["--out", tmp_path / "low", "--scheme", "w4a4-gptq", "--calibration", text, "--tokens", 64]
    assert "has no tokenizer that can be read" in error_of(capsys, "quantize", small, *options)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(small)
    message = error_of(capsys, "quantize", small, *options)
    assert "the model's vocabulary has 40 tokens: the tokenizer is another model's" in message
    assert not (tmp_path / "low").exists()


def test_names() -> None:
    assert settings_of_name("w4a16g128-gptq") == {
        "method": "gptq", "weight_bits": 4, "activation_bits": 16, "group_size": 128,
    }  # fmt: skip
    assert settings_of_name("w4g64a4-rtn") == settings_of_name("w4a4g64-rtn")
    assert settings_of_name("w4g64a8kv4g64-best") == {
        "method": "best", "weight_bits": 4, "activation_bits": 8, "key_bits": 4, "value_bits": 4, "group_size": 64,
        "activation_granularity": "group",
    }  # fmt: skip
    with pytest.raises(SparqError, match="has groups of 64 and of 32: inputs share the weights' groups"):
        settings_of_name("w4g64a4g32-rtn")


def test_sensitivity_is_the_librarys(
    backbone: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parts.json"
    options = ["--scheme", "w3a16-rtn", "--by", "kind", "--text", str(text), "--text-tokens", "90", "--context", "30"]
    assert main(["sensitivity", str(backbone), *options, "--out", str(out)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    ids = torch.cat(pieces(backbone, 90, 30), 1)[0]

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return {"text": math.log(prose_perplexity(model, ids, context=30).value)}

    model = load_model(str(backbone))
    scheme = QuantizationScheme.from_dict({"method": "rtn", "weight_bits": 3, "activation_bits": 16})
    report = sensitivity(model, None, scheme, measure, by="kind")
    assert json.loads(out.read_text()) == {
        "scheme": scheme.to_dict(), **json.loads(json.dumps(dataclasses.asdict(report)))
    }  # fmt: skip
    assert [line[0] for line in lines[:3]] == ["part", "none", "all"]
    order = sorted(report.parts, key=lambda part: part.worst, reverse=True)
    assert [line[0] for line in lines[3:]] == [part.part for part in order]
    assert lines[3][2] == f"{100 * math.expm1(order[0].worst):+.3f} %"


def test_a_budget_is_kept_and_saved(
    backbone: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "low"
    data = ["--text", str(text), "--text-tokens", "90", "--context", "30"]
    better = ["--budget", "0.5", "--better", "w8a8", "--by", "block"]
    assert main(["quantize", str(backbone), "--out", str(out), "--scheme", "w4a4-rtn", *better, *data]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == [str(out), "w4a4-rtn"]
    assert re.fullmatch(r"[01] of 2", lines[1][1])
    saved = scheme_of(load_quantized(out))
    assert saved is not None
    assert all(settings["activation_clip"] == 1.0 for settings in saved.layers.values())
    assert len(saved.layers) == 7 * int(lines[1][1][0])
    assert lines[2][0] == "text"
    assert float(lines[2][2].split()[0]) <= 50


def test_mistakes_of_budgets(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["quantize", backbone, "--out", tmp_path / "low", "--scheme", "w2a2-rtn"]
    assert "'5%' is not a share above 0, such as 0.05" in error_of(capsys, *options, "--budget", "5%")
    both = error_of(capsys, *options, "--budget", "1", "--resume", tmp_path / "blocks")
    assert both.startswith("--resume keeps one quantization and --budget makes several")
    assert "'a8' is not of the form w8 or w8a8" in error_of(capsys, *options, "--budget", "1", "--better", "a8")
    assert error_of(capsys, *options, "--by", "block").startswith("--by goes with --budget")
    assert error_of(capsys, *options, "--utterances", "5").startswith("--utterances goes with --budget-wer")
    assert "'-1' is not a number of points, such as 0.5" in error_of(capsys, *options, "--budget-wer=-1")
    words = error_of(capsys, *options, "--budget-wer", "0.5")
    assert words.endswith("is no trained SpeechLM: it has no word error rate to keep a budget of")
    message = error_of(capsys, *options, "--budget", "1e-7", "--better", "w3", "--by", "kind", "--text-tokens", "90")
    assert message.startswith("with all layers promoted the perplexity of text is +")
    assert error_of(capsys, *options, "--tasks", "asr").endswith("is no trained SpeechLM: leave --tasks out")
    assert not (tmp_path / "low").exists()
