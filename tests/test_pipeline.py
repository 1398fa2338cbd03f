"""The whole job, end to end, in a small world; every recipe of the repository; the trained model in use."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import small_world
from sparq.adaptation import load_speechlm
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import sum_errors
from sparq.quantization import load_quantized, quantize
from sparq.quantization.gptq import gptq_round
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.recipes.evaluate_step import recognize
from sparq.recipes.model_sections import EvaluateConfig
from sparq.recipes.quantize_step import run_quantize
from sparq.recipes.recipe import load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.train_step import load_split
from sparq.report import read_results

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted([*REPOSITORY.glob("recipes/*.yaml"), *REPOSITORY.glob("src/sparq/demo/*.yaml")])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    small_world.make_corpus(folder / "corpus")
    small_world.make_backbone(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A finished run of two frameworks."""
    prose = world / "prose.txt"
    prose.write_text("The quick brown fox jumps over the lazy dog. " * 150)
    recipe = small_world.write_recipe(
        world / "recipe.yaml",
        world / "corpus" / "manifest.tsv",
        world / "backbone",
        frameworks=["vanilla", "max_shift"],
        **{"evaluate.prose": str(prose)},
    )
    assert main(["run", str(recipe), "--out", str(world / "run")]) == 0
    return world / "run"


def test_a_run_gives_every_row_of_the_table(run: Path) -> None:
    results = read_results(run / "results.json")
    assert len(results.rows) == 2 * 5
    for row in results.rows:
        for metric in (row.textlm_ppl, row.speechlm_ppl, row.asr_wer, row.tts_uer, row.prose_ppl):
            assert metric is not None
            assert math.isfinite(metric.value)
        assert row.outliers is not None
        assert row.outliers.attention_mass == pytest.approx(1, abs=1e-5) or row.framework == "max_shift"
        tasks = row.outliers.by_task
        assert list(tasks) == (["TextLM", "SpeechLM", "ASR"] if row.precision == "full" else [])
        # The headline is over ASR and text together.
        if tasks:
            assert tasks["TextLM"].tokens + tasks["ASR"].tokens == row.outliers.tokens
            assert max(tasks[name].max_inf_norm for name in ("TextLM", "ASR")) == row.outliers.max_inf_norm
    assert set(results.curves) == {"vanilla", "max_shift"}
    assert [p.update for p in results.curves["vanilla"].points] == [1, 2, 3, 4]
    assert all(row.tts_cer is None for row in results.rows)
    assert "TTS was not measured from audio" in results.notes[0]
    page = (run / "report.html").read_text()
    assert "max_shift" in page
    assert "data:audio" in page


def test_the_same_command_again_does_nothing(run: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".steps" not in p.parts}
    assert main(["run", str(world / "recipe.yaml"), "--out", str(run)]) == 0
    assert "train-vanilla: already done" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".steps" not in p.parts}
    assert {p for p in before if before[p] != after[p]} <= {run / "recipe.yaml"}


@pytest.mark.parametrize("precision", ["full", "w4a4-smoothquant"])
def test_transcribe_and_continue(run: Path, world: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(run / "models" / "vanilla")
    wav = str(world / "corpus" / "0.wav")
    assert main(["transcribe", wav, wav, "--model", model, "--precision", precision]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith(wav + "\t")
    assert main(["continue", "--text", "red lamp", "--model", model, "--precision", precision, "--max-new", "5"]) == 0
    assert capsys.readouterr().out.startswith("red lamp")
    assert main(["continue", "--audio", wav, "--model", model, "--precision", precision, "--max-new", "5"]) == 0
    assert all(0 <= int(unit) < 8 for unit in capsys.readouterr().out.split())


def test_an_interrupted_quantization_goes_on_where_it_was(
    run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second block, it rounds no layer of the first again, and leaves nothing unfinished behind."""
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    recipe = load_recipe(world / "recipe.yaml", ["quantize.schemes=[w4a8-gptq]"])
    rounded: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(rounded) == interrupted_at:
            raise KeyboardInterrupt
        rounded.append(1)
        return gptq_round(*arguments, **options)

    monkeypatch.setattr("sparq.quantization.compensation.gptq_round", counted)
    interrupted_at, linears = 10, 14
    with pytest.raises(KeyboardInterrupt):
        run_quantize(recipe, copy, "vanilla")
    folder = copy.quantized("vanilla", "w4a8-gptq")
    assert not folder.exists()
    assert (folder.parent / "w4a8-gptq.unfinished" / "block-0000.safetensors").exists()
    interrupted_at = -1
    rounded.clear()
    run_quantize(recipe, copy, "vanilla")
    assert len(rounded) == linears // 2
    assert [path.name for path in sorted(folder.parent.iterdir()) if "gptq" in path.name] == ["w4a8-gptq"]


def test_a_trained_model_is_quantized_outside_of_its_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = run / "models" / "max_shift", tmp_path / "low"
    data = ["--scheme", "w4a8-gptq", "--tokens", "120", "--tasks", "asr", "textlm", "--text-tokens", "40"]
    assert main(["quantize", str(model), "--out", str(out), *data[:-2]]) == 0
    speechlm = load_speechlm(model)
    examples = task_examples(
        load_split(RunFolder(run), "train", speechlm.vocabulary), speechlm.vocabulary, tasks=("textlm", "asr"),
        tokens=120, seed=0,
    )  # fmt: skip
    batches = padded_batches(examples, speechlm.vocabulary)
    expected = quantize(speechlm.model, batches, method="gptq", weight_bits=4, activation_bits=8)
    ids = torch.tensor([examples["asr"][0].prompt])
    with torch.no_grad():
        assert torch.equal(load_quantized(out)(ids).logits, expected(ids).logits)
    capsys.readouterr()
    assert main(["sensitivity", str(model), "--by", "kind", *data]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["part", "weights", "textlm", "asr"]
    assert {line[0] for line in lines[3:]} == {f"self_attn.{x}_proj" for x in "qkvo"} | {
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    budget = ["--budget-wer", "30", "--utterances", "3", "--by", "kind", "--better", "w8a8"]
    mixed = tmp_path / "mixed"
    assert main(["quantize", str(model), "--out", str(mixed), "--scheme", "w2a4-rtn", *budget]) == 0
    name, rates, rise = capsys.readouterr().out.splitlines()[-1].split("\t")
    assert name == "asr WER %"
    before, after = (float(rate) for rate in rates.split(" to "))
    assert float(rise) == pytest.approx(after - before, abs=0.02)
    assert float(rise) <= 30
    spoken = [u for u in load_split(RunFolder(run), "valid", speechlm.vocabulary) if u.text]
    order = torch.randperm(len(spoken), generator=torch.Generator().manual_seed(0)).tolist()[:3]
    said = recognize(
        load_quantized(mixed), speechlm.vocabulary, "valid", [spoken[i] for i in order], EvaluateConfig(), "valid"
    )
    assert sum_errors(said, "words").rate == pytest.approx(after, abs=0.01)
    assert main(["quantize", str(model), "--out", str(tmp_path / "x"), *data[:2], "--attention", "vanilla"]) == 2
    assert "leave --attention out" in capsys.readouterr().err
    moved = shutil.copytree(model, tmp_path / "moved")
    assert main(["quantize", str(moved), "--out", str(tmp_path / "x"), *data[:2]]) == 2
    assert "is not in a run folder" in capsys.readouterr().err


def test_parts_that_do_not_belong_together_are_refused(run: Path, world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run / "models" / "vanilla", model)
    description = json.loads((model / "speechlm.json").read_text())

    def changed(**changes: object) -> Path:
        (model / "speechlm.json").write_text(json.dumps({**description, **changes}))
        return model

    with pytest.raises(SparqError, match="was made for units"):
        load_speechlm(changed(units_fingerprint="0" * 16))
    with pytest.raises(SparqError, match="trained with vocabulary 0000"):
        load_speechlm(changed(vocabulary_fingerprint="0" * 16))
    with pytest.raises(SparqError, match="was trained on weights 0000.*holds"):
        load_speechlm(changed(backbone_checksum="0" * 64))
    with pytest.raises(SparqError, match="is not a SpeechLM description of format 1"):
        load_speechlm(changed(format=9))
    changed()
    (model / "vocabulary.safetensors").write_bytes((model / "vocabulary.safetensors").read_bytes()[:99])
    with pytest.raises(SparqError, match="not a whole safetensors file"):
        load_speechlm(model)
    with pytest.raises(SparqError, match="is not a SpeechLM folder"):
        load_speechlm(world)


def test_another_kmeans_is_refused_when_transcribing(run: Path, world: Path, tmp_path: Path) -> None:
    from sparq.recipes.apply import transcribe
    from sparq.units import KMeans

    model = tmp_path / "model"
    shutil.copytree(run / "models" / "vanilla", model)
    kmeans = KMeans.load(model / "kmeans.safetensors")
    KMeans(centroids=kmeans.centroids + 1, metadata=kmeans.metadata).save(model / "kmeans.safetensors")
    with pytest.raises(SparqError, match="but the model was trained on units"):
        transcribe(model=model, files=[world / "corpus" / "0.wav"])


def test_merged_adapters_equal_the_trained_model(run: Path, world: Path) -> None:
    """What is stored, merged into a fresh float32 backbone, computes what the adapted model computed."""
    from peft import PeftModel

    from sparq.adaptation.lora import quiet_peft
    from sparq.models import load_backbone
    from sparq.models.speechlm import replace_vocabulary

    speechlm = load_speechlm(run / "models" / "max_shift")
    base = load_backbone(str(world / "backbone"), attention="max_shift").model
    replace_vocabulary(base, speechlm.vocabulary, speechlm.model.get_input_embeddings().weight.detach())
    with quiet_peft():
        adapted = PeftModel.from_pretrained(base, run / "models" / "max_shift" / "adapter")
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(speechlm.model(ids).logits, adapted.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert speechlm.model.get_input_embeddings().weight is speechlm.model.get_output_embeddings().weight


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_at_a_tiny_size(
    recipe: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SPARQ_HUMAN_DATA", "SPARQ_CORPUS", "SPARQ_DEMO_CORPUS"):
        monkeypatch.setenv(variable, str(tmp_path))
    overrides = small_world.tiny_overrides(
        world / "corpus" / "manifest.tsv", world / "backbone", frameworks=["softmax1"],
        **{"quantize.schemes": ["w4a4-smoothquant"], "vocab.extra_text": []},
    )  # fmt: skip
    arguments = [argument for override in overrides for argument in ("--set", override)]
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), *arguments]) == 0
    assert len(read_results(tmp_path / "run" / "results.json").rows) == 2


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("opt", "full"),
        ("opt", "lora"),
        ("opt-post-norm", "full"),
        ("opt-post-norm", "lora"),
        ("opt-post-norm", "qlora"),
    ],
)
def test_opt_families_and_all_methods(world: Path, tmp_path: Path, family: str, method: str) -> None:
    backbone = small_world.make_backbone(tmp_path / "backbone", family)
    recipe = small_world.write_recipe(
        tmp_path / "recipe.yaml", world / "corpus" / "manifest.tsv", backbone, frameworks=["softmax1"],
        **{"train.method": method, "train.dtype": "float32", "quantize.schemes": ["w8a8-smoothquant"]},
    )  # fmt: skip
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    results = read_results(tmp_path / "run" / "results.json")
    full, quantized = results.rows
    assert full.textlm_ppl is not None
    assert quantized.textlm_ppl is not None
    assert quantized.textlm_ppl.value == pytest.approx(full.textlm_ppl.value, rel=0.05)
