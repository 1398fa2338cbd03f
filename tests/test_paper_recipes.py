"""The papers' configurations: what they say, and that each trains at a tiny size."""

from pathlib import Path

import pytest

import small_world
from sparq.adaptation import load_speechlm
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.recipes.recipe import load_recipe
from sparq.recipes.train_step import lora_settings

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "paper"
SIZES = {"125m": "opt", "350m": "opt-post-norm", "1.3b": "opt"}
METHODS = ("full", "lora", "qlora")


def test_there_is_one_for_every_size_and_method() -> None:
    assert {p.name for p in RECIPES.iterdir()} == {f"opt{size}-{method}.yaml" for size in SIZES for method in METHODS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_the_papers_say(size: str, method: str) -> None:
    recipe = load_recipe(RECIPES / f"opt{size}-{method}.yaml", environ={"SPARQ_CORPUS": "/corpus"})
    assert recipe.model.backbone == f"facebook/opt-{size}"
    assert recipe.frameworks == ("vanilla", "softmax1")
    assert (recipe.units.features, recipe.units.k, recipe.vocab.size) == ("hubert", 200, 5000)
    train = recipe.train
    assert (train.learning_rate, train.warmup_updates, train.weight_decay) == (3e-4, 2500, 1e-6)
    assert (train.batch_tokens, train.accumulate, train.schedule) == (5000, 40, "constant")
    settings = lora_settings(recipe)
    assert (settings is None) == (method == "full")
    if settings is not None:
        assert (settings.rank, settings.alpha, settings.dropout, settings.targets) == (256, 256, 0.05, ())
        assert settings.base == ("int8" if method == "qlora" else None)
    assert (recipe.quantize.calibration_sequences, recipe.quantize.smoothing_alpha) == (256, 0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers")
    small_world.make_corpus(folder / "corpus", utterances=20)
    for family in ("opt", "opt-post-norm"):
        small_world.make_backbone(folder / family, family)
    return folder


def train(world: Path, recipe: str, family: str, **changes: object) -> Path:
    """Run a recipe up to training, in one folder for all, so that units and vocabulary are made once."""
    overrides = small_world.tiny_overrides(
        world / "corpus" / "manifest.tsv", world / family, frameworks=["softmax1"],
        **{"train.updates": 2, "train.validate_updates": 1, **changes},
    )  # fmt: skip
    arguments = [argument for override in overrides for argument in ("--set", override)]
    arguments += ["--until", "train", "--overwrite", "train-softmax1", "--out", str(world / "run")]
    assert main(["run", str(RECIPES / recipe), *arguments]) == 0
    return world / "run" / "models" / "softmax1"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_at_a_tiny_size(world: Path, monkeypatch: pytest.MonkeyPatch, size: str, method: str) -> None:
    monkeypatch.setenv("SPARQ_CORPUS", str(world / "corpus"))
    description = load_speechlm(train(world, f"opt{size}-{method}.yaml", SIZES[size])).description
    assert description.method == method
    assert description.base == ("int8" if method == "qlora" else None)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"initialization": "pissa", "dora": True}),
        ("lora", {"initialization": "eva", "rslora": True}),
        ("qlora", {"initialization": "loftq", "base": "nf4-double"}),
    ],
)
def test_variants_are_settings(
    world: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, object]
) -> None:
    monkeypatch.setenv("SPARQ_CORPUS", str(world / "corpus"))
    changes = {f"train.{name}": value for name, value in settings.items()}
    model = load_speechlm(train(world, f"opt350m-{method}.yaml", "opt-post-norm", **changes))
    trained = model.description.training["settings"]["train"]
    assert {name: trained[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "train.method=qlora train.initialization=pissa",
            "initialization is 'pissa': expected kaiming or eva or loftq",
        ),
        ("train.method=lora train.initialization=loftq", "expected kaiming or pissa or olora or eva with method lora"),
        ("train.method=full train.dora=true", "recipe.train.dora is True: expected false with method full"),
        ("train.method=full train.rslora=true", "recipe.train.rslora is True: expected false with method full"),
        ("train.method=qlora train.base=nf3", "recipe.train.base is 'nf3': did you mean 'nf4'"),
        ("train.method=qlora train.loftq_iterations=0", "recipe.train.loftq_iterations is 0: expected more than 0"),
    ],
)
def test_settings_that_contradict_each_other(settings: str, message: str) -> None:
    with pytest.raises(SparqError, match=message):
        load_recipe(RECIPES / "opt125m-lora.yaml", settings.split(), environ={"SPARQ_CORPUS": "/corpus"})
