"""`sparq train --plan`: exact counts, bytes against closed forms, and what it says."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import small_world
from sparq.adaptation import LoraSettings, add_lora, read_description
from sparq.adaptation.lora_linear import LoraLinear
from sparq.cli.main import main
from sparq.data import pack
from sparq.models import convert
from sparq.recipes import train_plan
from sparq.recipes.recipe import load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.tokens import Example
from sparq.training import LanguageModelLoss
from sparq.training.cost import TrainingCost
from sparq.training.flops import ModelFlops, matmul_rate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    small_world.make_corpus(folder / "corpus", utterances=20)
    for family in ("llama", "opt-post-norm"):
        small_world.make_backbone(folder / family, family)
    return folder


def recipe_file(world: Path, family: str = "llama", **changes: object) -> Path:
    manifest = world / "corpus" / "manifest.tsv"
    changes = {"frameworks": ["softmax1"], "train.updates": 2, **changes}
    return small_world.write_recipe(world / "recipe.yaml", manifest, world / family, **changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_plan, "_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"train.method": "lora", "train.dora": True}),
        ("llama", {"train.method": "full", "train.dtype": "float32"}),
        ("opt-post-norm", {"train.method": "qlora", "train.base": "nf4"}),
    ],
)
def test_counts_are_those_of_the_trained_model(world: Path, family: str, changes: dict[str, object]) -> None:
    file = recipe_file(world, family, **changes)
    out = world / f"run-{family}-{changes['train.method']}"
    plan = train_plan.plan_training(load_recipe(file), None).frameworks[0]
    assert main(["run", str(file), "--until", "train", "--out", str(out)]) == 0
    assert plan.trained == read_description(out / "models" / "softmax1").training["trained_parameters"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_follow_from_the_counts(world: Path, dtype: str) -> None:
    recipe = load_recipe(recipe_file(world, **{"train.dtype": dtype}))
    plan = train_plan.plan_training(recipe, None).frameworks[0]
    width = 4 if dtype == "float32" else 2
    # Buffers: frequencies of the rotation and the like.
    assert width * plan.parameters <= plan.cost.weights < width * plan.parameters + 1000
    copies = 0 if dtype == "float32" else 4
    steps = 4 * 29  # one number a tensor: embedding, and A and B of 7 layers in 2 blocks
    assert plan.cost.optimizer == (8 + copies) * plan.trained + steps
    assert plan.memory > plan.process + plan.cost.weights + plan.cost.optimizer


def test_fewer_blocks_give_the_bytes_of_all(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = small_world.make_backbone(tmp_path / "deep")
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 6
    config.layer_types = None
    config.save_pretrained(folder)
    recipe = load_recipe(recipe_file(world, **{"model.backbone": str(folder)}))
    whole = train_plan.plan_training(recipe, None).frameworks[0]
    monkeypatch.setattr(train_plan, "_most_blocks", lambda *_: 4)
    part = train_plan.plan_training(recipe, None).frameworks[0]
    assert (whole.measured_blocks, part.measured_blocks) == ((6,), (2, 4))
    assert (part.trained, part.parameters) == (whole.trained, whole.parameters)
    assert (part.cost.weights, part.cost.optimizer) == (whole.cost.weights, whole.cost.optimizer)


def test_costs_are_linear_in_blocks() -> None:
    def cost(blocks: int) -> TrainingCost:
        fields = dataclasses.fields(TrainingCost)
        return TrainingCost(**{field.name: number + 2.0 * blocks for number, field in enumerate(fields)})

    assert cost(4).with_blocks(24, own=4, fewer=cost(2), fewer_blocks=2) == cost(24)


def test_time_is_that_of_updates_and_validations(world: Path) -> None:
    recipe = load_recipe(
        recipe_file(world, **{"train.updates": 10, "train.accumulate": 3, "train.validate_updates": 4})
    )
    plan = train_plan.plan_training(recipe, None)
    cost = TrainingCost(weights=0.0, optimizer=0.0, step=0.0, micro_batch=0.5, update=7.0, validation=0.25)
    framework = dataclasses.replace(plan.frameworks[0], cost=cost)
    shapes = dataclasses.replace(plan.shapes, validation_tokens=100)
    plan = dataclasses.replace(plan, shapes=shapes)
    # Full micro-batches of 400 tokens hold 3 sequences of 128; 10 updates are validated after 1, 4, 8 and 10.
    assert plan.seconds(framework) == (10 * (3 * 384 * 0.5 + 7), 4 * 100 * 0.25)


def test_lengths_are_those_of_the_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = recipe_file(world, **{"train.packing": False}), world / "lengths"
    assert main(["train", str(file), "--plan", "--out", str(out)]) == 0
    assert "because the run has no vocabulary of this recipe: `sparq run --until vocab`" in capsys.readouterr().out
    assert main(["run", str(file), "--until", "train", "--out", str(out)]) == 0
    plan = train_plan.plan_training(load_recipe(file), RunFolder(out))
    assert plan.shapes.source == "lengths are those of 16 of 16 utterances"
    assert plan.shapes.validation_tokens
    training = read_description(out / "models" / "softmax1").training
    # One epoch of so few utterances is one micro-batch, and the first two are alike.
    assert training["tokens"] / training["updates"] == pytest.approx(plan.update_tokens, rel=0.2)
    capsys.readouterr()
    assert main(["train", str(file), "--plan", "--out", str(out)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| softmax1")]
    assert f"| {training['trained_parameters']:,} |" in row


def test_without_a_run_folder(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe_file(world)
    before = sorted(world.rglob("*"))
    assert main(["train", str(file), "--plan"]) == 0
    assert "lengths of 128 tokens are assumed, because no --out names a run" in capsys.readouterr().out
    assert sorted(world.rglob("*")) == before
    assert main(["train", str(file)]) == 2
    assert "required: --out" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [None, 4])
def test_operations_are_those_that_pytorch_counts(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter does not know products that add to what is there, as the fused layer's do: PEFT's own have none.
    monkeypatch.setattr(LoraLinear, "_is_plain", lambda *_: False)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model: PreTrainedModel = convert(LlamaForCausalLM(config), "softmax1")
    if rank is not None:
        model = add_lora(model, LoraSettings(rank=rank, dropout=0.0))
    batch = pack([Example(task="asr", prompt=(7, 8, 9), target=(5,) * 17)])
    loss = LanguageModelLoss(model).train()
    with FlopCounterMode(display=False) as counter:
        loss(batch).objective.backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "bmm" in name)
    flops = ModelFlops.of(model)
    assert sum(counts.values()) - attention == flops.per_token * 20 + flops.per_target * 17
    # Written out, attention computes what the mask hides too.
    assert attention == flops.per_pair * 20 * 20
    assert flops.of_batch(batch) == flops.per_token * 20 + flops.per_target * 17 + flops.per_pair * 210


def test_a_rate_of_products_is_measured() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e16
