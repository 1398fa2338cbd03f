"""Text alone in training: how much of it an epoch shows, what is left out, and that it is learned."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import small_world
from sparq.adaptation import load_speechlm, trainable_parameters
from sparq.cli.main import main
from sparq.data.batching import epoch_groups
from sparq.errors import SparqError
from sparq.evaluation.perplexity import log_likelihoods
from sparq.recipes.jobs import plan
from sparq.recipes.pipeline import STEPS
from sparq.recipes.recipe import Recipe, load_recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.text_alone import text_alone
from sparq.recipes.train_step import (
    build_model,
    load_split,
    load_vocabulary,
    start_training,
    stream_options,
    training_stream,
)
from sparq.recipes.training_shapes import training_shapes
from sparq.tokens import Example, make_example
from sparq.training import TrainingRun

TEXT = ["open open open close", "lamp lamp lamp lamp door", "close close red"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its vocabulary, and text of which every fourth line is held out as a transcript."""
    folder = tmp_path_factory.mktemp("world")
    small_world.make_corpus(folder / "corpus")
    small_world.make_backbone(folder / "backbone")
    assert main(["run", str(write(folder, "recipe")), "--out", str(folder / "run"), "--until", "vocab"]) == 0
    (folder / "lm.txt").write_text("".join(f"{text}\n" for text in [*TEXT, held_out(folder)[0].upper()] * 10))
    return folder


def write(folder: Path, name: str, **changes: object) -> Path:
    settings = {
        "train.method": "full", "train.dtype": "float32", "train.updates": 30, "train.learning_rate": 3e-3,
        "train.batch_tokens": 240, "train.label_smoothing": 0.0, "train.validate_updates": 99,
    }  # fmt: skip
    path, manifest = folder / f"{name}.yaml", folder / "corpus" / "manifest.tsv"
    return small_world.write_recipe(
        path, manifest, folder / "backbone", frameworks=["vanilla"], **{**settings, **changes}
    )


def with_text(folder: Path, lines: int = 0, **changes: object) -> Path:
    text = {"train.extra_text": [str(folder / "lm.txt")], "train.extra_lines": lines}
    return write(folder, "with-text", **{**text, **changes})


def held_out(folder: Path) -> list[str]:
    run = RunFolder(folder / "run")
    return [u.text for split in ("valid", "test") for u in load_split(run, split, load_vocabulary(run))]


def epoch_of(recipe: Recipe, run: RunFolder, epoch: int) -> Counter[Example]:
    vocabulary, utterances = load_vocabulary(run), load_split(run, "train", load_vocabulary(run))
    with text_alone(recipe, run, vocabulary) as texts:
        groups = epoch_groups(utterances, vocabulary, epoch=epoch, **stream_options(recipe, utterances, texts))
    return Counter(example for group in groups for example in group)


def tasks(examples: Counter[Example]) -> Counter[str]:
    return Counter(example.task for example in examples.elements())


@pytest.mark.parametrize("changes", [{}, {"train.task_temperature": 2.0}, {"train.packing": False}])
def test_an_epoch_has_so_many_more_sequences_of_textlm(world: Path, changes: dict[str, object]) -> None:
    run = RunFolder(world / "run")
    for lines, more in ((0, 30), (7, 7), (99, 30)):
        for epoch in range(2):
            alone = epoch_of(load_recipe(write(world, "alone", **changes)), run, epoch)
            joined = epoch_of(load_recipe(with_text(world, lines, **changes)), run, epoch)
            assert joined >= alone
            assert tasks(joined) - tasks(alone) == {"textlm": more}


def test_held_out_transcripts_are_left_out(world: Path) -> None:
    run = RunFolder(world / "run")
    vocabulary = load_vocabulary(run)
    with text_alone(load_recipe(with_text(world)), run, vocabulary) as texts:
        assert texts is not None
        shown = Counter(vocabulary.decode_text(example.target) for example in texts(0))
    assert shown == dict.fromkeys(TEXT, 10)
    assert not set(held_out(world)) & set(shown)


def test_characters_that_the_vocabulary_lacks_are_named(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, run = world / "foreign.txt", RunFolder(world / "run")
    text.write_text("red\nÜber 50 lamp\n")
    with text_alone(load_recipe(with_text(world, **{"train.extra_text": [str(text)]})), run, load_vocabulary(run)):
        pass
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    # Of the words, red, green, lamp, door, open and close, there is no b.
    assert warning.strip().startswith("foreign.txt: the vocabulary lacks 0 5 b ü, trained as <unk>: name the file in")
    caplog.clear()
    with text_alone(load_recipe(with_text(world)), run, load_vocabulary(run)):
        pass
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def nll(model: torch.nn.Module, vocabulary: object, texts: list[str]) -> float:
    examples = [make_example(vocabulary, "textlm", text=text, units=()) for text in texts]  # type: ignore[arg-type]
    return -sum(log_likelihoods(model, examples, batch_size=4)) / sum(len(e.target) for e in examples)  # type: ignore[arg-type]


def test_a_model_learns_the_text(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than it does from the transcripts."""
    found: dict[str, float] = {}
    for name, file in (("alone", write(world, "alone")), ("joined", with_text(world, 10))):
        shutil.copytree(world / "run", tmp_path / name)
        capsys.readouterr()
        assert main(["train", str(file), "--out", str(tmp_path / name)]) == 0
        said = "  lm.txt: 30 lines, of which an epoch shows 10; 10 held-out transcripts left out\n"
        assert (said in capsys.readouterr().err) == (name == "joined")
        trained = load_speechlm(tmp_path / name / "models" / "vanilla")
        found[name] = nll(trained.model, trained.vocabulary, TEXT)
    recipe, run = load_recipe(write(world, "alone")), RunFolder(world / "run")
    vocabulary, utterances = load_vocabulary(run), load_split(run, "train", load_vocabulary(run))
    model, *_ = build_model(recipe, "vanilla", vocabulary, training_stream(recipe, vocabulary, utterances))
    found["before"] = nll(model.eval(), vocabulary, TEXT)
    assert found["joined"] < 0.85 * found["alone"] < found["alone"] < found["before"], found


def test_resumed_equals_uninterrupted_bit_for_bit(world: Path, tmp_path: Path) -> None:
    recipe, run = (
        load_recipe(with_text(world, 7, **{"train.updates": 9, "train.accumulate": 2})),
        RunFolder(world / "run"),
    )
    vocabulary = load_vocabulary(run)

    def train(folder: Path, updates: int | None) -> TrainingRun:
        with text_alone(recipe, run, vocabulary) as texts:
            training, _ = start_training(
                recipe, "vanilla", vocabulary=vocabulary, utterances=load_split(run, "train", vocabulary),
                validation=[], folder=folder, texts=texts, updates=updates,
            )  # fmt: skip
            training.train("test")
        return training

    whole = train(tmp_path / "whole", None)
    assert whole.log[-1].epochs is not None
    assert whole.log[-1].epochs > 2
    train(tmp_path / "cut", 4)
    resumed = train(tmp_path / "cut", None)
    for name, parameter in trainable_parameters(whole.model).items():
        assert torch.equal(parameter, trainable_parameters(resumed.model)[name]), name
    logs = [[dataclasses.replace(u, seconds=0.0, speed=None) for u in training.log] for training in (whole, resumed)]
    assert logs[0] == logs[1]


def test_other_text_makes_trainings_stale(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "lm.txt", tmp_path / "run"
    text.write_text("red lamp\n")
    file = with_text(world, **{"train.extra_text": [str(text)], "train.updates": 2})
    shutil.copytree(world / "run", out)
    assert main(["train", str(file), "--out", str(out)]) == 0
    before = {job.name: job.key for job in plan(load_recipe(file), STEPS)}
    text.write_text("red door\n")
    after = {job.name: job.key for job in plan(load_recipe(file), STEPS)}
    changed = {"train-vanilla", "quantize-vanilla", "evaluate-vanilla", "report"}
    assert {name for name in before if before[name] != after[name]} == changed
    assert main(["train", str(file), "--out", str(out)]) == 2
    assert f"{text} has other content now: use another --out or --overwrite train" in capsys.readouterr().err
    text.unlink()
    assert main(["train", str(file), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"sparq: error: no such file: {text}\n"
    # Without text the key is that of a recipe which never had any.
    assert main(["train", str(write(world, "alone")), "--out", str(out)]) == 2
    assert "train.extra_text was" in capsys.readouterr().err


def test_a_line_that_fits_no_batch_is_named(world: Path) -> None:
    text = world / "long.txt"
    text.write_text("red lamp\n" + "green " * 300 + "\n")
    recipe, run = load_recipe(with_text(world, **{"train.extra_text": [str(text)]})), RunFolder(world / "run")
    right = r"long.txt, the line that begins with .green green .*: a textlm .* = 240: set it .* or shorten the text"
    with pytest.raises(SparqError, match=right), text_alone(recipe, run, load_vocabulary(run)):
        pass


def test_the_plan_counts_the_text(world: Path) -> None:
    run = RunFolder(world / "run")
    alone = training_shapes(load_recipe(write(world, "alone")), run)
    joined = training_shapes(load_recipe(with_text(world, 7)), run)
    assert joined.source == "lengths are those of 24 of 24 utterances and 7 of 7 lines of text"
    assert alone.epoch_tokens is not None
    assert joined.epoch_tokens is not None
    vocabulary = load_vocabulary(run)
    with text_alone(load_recipe(with_text(world, 7)), run, vocabulary) as texts:
        assert texts is not None
        assert joined.epoch_tokens - alone.epoch_tokens == sum(map(len, texts(0)))
