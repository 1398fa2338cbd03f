"""Recipes: paths and variables resolved, values checked against each other, settings handed to stamps."""

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparq.configuration import dump_yaml, from_mapping, to_mapping
from sparq.errors import SparqError
from sparq.files import fingerprint
from sparq.recipes.recipe import Recipe, load_recipe, used_settings

DEMO = Path(str(files("sparq") / "demo" / "demo.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "prepare": {"sources": [{"manifest": "data/manifest.tsv", "corpus": "an4"}]},
    "model": {"backbone": "pretrained:smollm2-135m"},
    "train": {"updates": 3000},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_relative_paths_start_at_the_recipe(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overrides = [
        "vocab.extra_text=[../extra.txt]",
        "train.extra_text=[../lm.txt.gz, /abs/lm.txt]",
        "evaluate.prose=/abs/prose.txt",
        "units.features=./hubert",
    ]
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("recipes/tiny.yaml"), overrides)
    assert recipe.prepare.sources[0].manifest == tmp_path / "recipes" / "data" / "manifest.tsv"
    assert recipe.vocab.extra_text == (tmp_path / "extra.txt",)
    assert recipe.train.extra_text == (tmp_path / "lm.txt.gz", Path("/abs/lm.txt"))
    assert recipe.evaluate.prose == Path("/abs/prose.txt")
    assert recipe.units.features == str(tmp_path / "recipes" / "hubert")
    assert recipe.model.backbone == "pretrained:smollm2-135m"


def test_a_folder_in_place_of_a_manifest(file: Path, tmp_path: Path) -> None:
    override = "prepare.sources.0={corpus: ls, folder: '../${NAME}', format: librispeech, subsets: [dev-clean]}"
    source = load_recipe(file, [override], environ={"NAME": "LibriSpeech"}).prepare.sources[0]
    assert (source.path, source.layout, source.subsets) == (tmp_path / "LibriSpeech", "librispeech", ("dev-clean",))


def test_hub_names_stay_names(file: Path) -> None:
    recipe = load_recipe(file, ["model.backbone=facebook/opt-125m", "units.features=mfcc"])
    assert (recipe.model.backbone, recipe.units.features) == ("facebook/opt-125m", "mfcc")


def test_environment_variables(file: Path) -> None:
    overrides = ["prepare.sources.0.manifest=${DATA}/a.tsv", "model.backbone=${MODELS}/opt"]
    recipe = load_recipe(file, overrides, environ={"DATA": "/corpora", "MODELS": "/models"})
    assert recipe.prepare.sources[0].manifest == Path("/corpora/a.tsv")
    assert recipe.model.backbone == "/models/opt"
    with pytest.raises(SparqError) as caught:
        load_recipe(file, overrides, environ={"DATA": "", "MODELS": "/models"})
    assert str(caught.value) == (
        "recipe.prepare.sources[0].manifest is '${DATA}/a.tsv', but the environment variable DATA is "
        "not set: export DATA=..."
    )


def test_a_resolved_recipe_is_a_recipe_and_resolves_to_itself(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["evaluate.prose=prose.txt"])
    elsewhere = tmp_path / "run" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump_yaml(to_mapping(recipe)))
    assert load_recipe(elsewhere) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frameworks=[sofmax1]", "recipe.frameworks[0] is 'sofmax1': did you mean 'softmax1'?"),
        ("frameworks=[softmax1+gate]", "recipe.frameworks[0] is 'softmax1+gate': did you mean 'gated' or 'gated_mlp'?"),
        ("frameworks=[gated+softmax1]", "recipe.frameworks[0] is 'gated+softmax1': expected softmax1+gated"),
        ("frameworks=[softmax1+max_shift]", "attention 'softmax1+max_shift' names two of a kind"),
        ("frameworks=[]", "recipe.frameworks is []: expected at least one of vanilla, softmax1, max_shift"),
        ("frameworks=[vanilla, vanilla]", "recipe.frameworks lists 'vanilla' twice: list it once"),
        ("name=' '", "recipe.name is ' ': expected a name"),
        ("seed=-1", "recipe.seed is -1: expected from 0 to 4294967295"),
        ("threads=-1", "recipe.threads is -1: expected at least 0"),
        ("prepare.sources=[]", "recipe.prepare.sources is []: expected at least one source"),
        (
            "prepare.sources.0={corpus: a}",
            "recipe.prepare.sources[0].manifest is missing: expected a manifest, or a folder and its format",
        ),
        (
            "prepare.sources.0={corpus: a, folder: x, format: librispeach}",
            "recipe.prepare.sources[0].format is 'librispeach': did you mean 'librispeech'",
        ),
        (
            "prepare.sources.0={corpus: a, folder: x}",
            "recipe.prepare.sources[0].format is None: expected one of librispeech, librilight, mls, libritts, vctk,",
        ),
        (
            "prepare.sources.0.format=kaldi",
            "recipe.prepare.sources[0] has a manifest, and a folder, format or subsets: expected one or the other",
        ),
        (
            "prepare.sources.0={corpus: a, folder: x, format: kaldi, subsets: [b, b]}",
            "recipe.prepare.sources[0].subsets lists 'b' twice",
        ),
        ("prepare.sources.0.splits=drawm", "recipe.prepare.sources[0].splits is 'drawm': did you mean 'drawn'"),
        ("prepare.sources.0.corpus=''", "recipe.prepare.sources[0].corpus is '': expected a name"),
        (
            "prepare.sources.0.test_split=valid",
            "recipe.prepare.sources[0].test_split is 'valid': expected letters",
        ),
        (
            "prepare.sources.0.test_split=test/a",
            "recipe.prepare.sources[0].test_split is 'test/a': expected letters",
        ),
        (
            "prepare.sources.0.test_fraction=1",
            "recipe.prepare.sources[0].test_fraction is 1.0: expected at least 0",
        ),
        (
            "prepare.sources.0.test_fraction=0.95",
            "recipe.prepare.sources[0]: test_fraction + valid_fraction is 1.0: expected less than 1",
        ),
        ("prepare.max_seconds=0", "recipe.prepare.max_seconds is 0.0: expected more than 0"),
        ("units.k=1001", "recipe.units.k is 1001: expected from 2 to 1000"),
        ("units.k=1", "recipe.units.k is 1: expected from 2 to 1000"),
        ("units.layer=-1", "recipe.units.layer is -1: expected at least 0"),
        ("units.max_frames=100", "recipe.units.max_frames is 100: expected at least recipe.units.k, 200"),
        ("units.shard_utterances=0", "recipe.units.shard_utterances is 0: expected more than 0"),
        ("units.features=''", "recipe.units.features is '': expected a name"),
        (
            "vocab.size=200",
            "recipe.vocab.size is 200: expected more than recipe.units.k, 200, because each unit",
        ),
        ("vocab.text_repeat=0", "recipe.vocab.text_repeat is 0: expected more than 0"),
        ("vocab.model_type=char", "recipe.vocab.model_type is 'char': valid: unigram, bpe"),
        ("model.new_row_noise=-0.5", "recipe.model.new_row_noise is -0.5: expected at least 0"),
        ("train.updates=0", "recipe.train.updates is 0: expected more than 0"),
        (
            "train.updates=10",
            "recipe.train.warmup_updates is 2500: expected from 0 to recipe.train.updates, 10",
        ),
        ("train.dropout=1", "recipe.train.dropout is 1.0: expected at least 0 and less than 1"),
        ("train.weight_decay=-1e-6", "recipe.train.weight_decay is -1e-06: expected at least 0"),
        ("train.learning_rate=0", "recipe.train.learning_rate is 0.0: expected more than 0"),
        ("train.learnin_rate=1", "recipe.train.learnin_rate is unknown: did you mean 'learning_rate'"),
        ("train.targets=[a, a]", "recipe.train.targets lists 'a' twice"),
        (
            "train.task_weights={asr: 0, tts: 0, speechlm: 0, textlm: 0}",
            "recipe.train.task_weights is 'all 0': expected at least one weight above 0",
        ),
        (
            "train.extra_lines=5",
            "recipe.train.extra_lines is 5: expected 0, because recipe.train.extra_text names no file",
        ),
        ("train={updates: 9, warmup_updates: 9, extra_text: [a], extra_lines: -1}", "recipe.train.extra_lines is -1"),
        ("train.task_weights.asr=-1", "recipe.train.task_weights.asr is -1.0: expected at least 0"),
        ("quantize.schemes=[w4a4]", "recipe.quantize.schemes[0] is 'w4a4': did you mean 'w4a4-rtn'"),
        ("quantize.schemes=[]", "recipe.quantize.schemes is []: expected at least one, such as w8a8-rtn"),
        (
            "quantize.schemes=[w9a8-rtn]",
            "recipe.quantize.schemes[0] is 'w9a8-rtn': weight_bits is 9; it must be 2 to 8",
        ),
        ("quantize.schemes=[w8a8-rtn, w8a8-rtn]", "recipe.quantize.schemes lists 'w8a8-rtn' twice: list it once"),
        ("quantize.smoothing_alpha=1.5", "recipe.quantize.smoothing_alpha is 1.5: expected from 0 to 1"),
        ("evaluate.beam=0", "recipe.evaluate.beam is 0: expected more than 0"),
        ("evaluate.tts_utterances=-1", "recipe.evaluate.tts_utterances is -1: expected at least 0"),
    ],
)
def test_mistakes(file: Path, override: str, message: str) -> None:
    with pytest.raises(SparqError) as caught:
        load_recipe(file, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_used_settings_leave_out_what_changes_no_result(file: Path) -> None:
    recipe = load_recipe(file)
    other = load_recipe(file, ["prepare.skip_bad=true", "train.checkpoint_updates=7", "threads=3"])
    names = ("prepare", "units.k", "train", "seed", "frameworks")
    assert used_settings(recipe, *names) == used_settings(other, *names)
    settings = used_settings(recipe, *names)
    assert settings["units"] == {"k": 200}
    assert settings["seed"] == 0
    assert settings["frameworks"] == ["vanilla", "softmax1", "max_shift"]
    assert "skip_bad" not in settings["prepare"]


def test_newer_settings_leave_runs_that_exist_as_they_are(file: Path) -> None:
    """The name that the demo's trainings had before there were such settings."""
    demo = load_recipe(DEMO, environ={"SPARQ_DEMO_CORPUS": "/nowhere"})
    assert fingerprint(used_settings(demo, "train", "model", "seed")) == "1eec6e516b265b7c"
    assert used_settings(load_recipe(file), "train")["train"].keys().isdisjoint({"extra_text", "extra_lines"})
    given = load_recipe(file, ["train.extra_text=[/lm.txt]", "train.extra_lines=7"])
    settings = used_settings(given, "train")["train"]
    assert (settings["extra_text"], settings["extra_lines"]) == (["/lm.txt"], 7)


def test_used_settings_join_fields_of_one_section(file: Path) -> None:
    assert used_settings(load_recipe(file), "units.k", "units.layer") == {"units": {"k": 200, "layer": 6}}


def test_every_field_is_described() -> None:
    """A setting that only the code knows about is no setting."""
    pending: list[Any] = [from_mapping(Recipe, MINIMAL)]
    while pending:
        config = pending.pop()
        described = type(config).__doc__ or ""
        for field in dataclasses.fields(config):
            assert f"\n        {field.name}: " in described, f"{type(config).__name__}.{field.name}"
            value = getattr(config, field.name)
            values = value if isinstance(value, tuple) else (value,)
            pending += [inner for inner in values if dataclasses.is_dataclass(inner)]
