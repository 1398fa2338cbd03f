"""The loop against a plain reference, exact resume, and what is trained."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparq.adaptation import LoraSettings, add_lora, trainable_parameters
from sparq.adaptation.settings import Base
from sparq.data import IGNORE, Batch, collate, pack
from sparq.errors import SparqError
from sparq.models import convert, converted_layers
from sparq.tokens import Example
from sparq.training import LanguageModelLoss, TrainingRun, TrainingSettings, read_log
from sparq.training.optimizer import MasterAdam, learning_rate


def stream(skip: int = 0) -> Iterator[Batch]:
    for number in itertools.count(skip):
        generator = torch.Generator().manual_seed(number)
        draw = torch.randint(5, 96, (4, 12), generator=generator)
        rows = [tuple(row.tolist()) for row in draw]
        examples = [Example(task="asr", prompt=r[: 3 + i], target=r[3 + i :]) for i, r in enumerate(rows)]
        yield collate(examples, pad_id=0)


def packed_stream(skip: int = 0) -> Iterator[Batch]:
    """Documents of 2 to 14 tokens in one row."""
    for number in itertools.count(skip):
        generator = torch.Generator().manual_seed(number)
        lengths = torch.randint(2, 15, (5,), generator=generator).tolist()
        rows = [tuple(torch.randint(5, 96, (length,), generator=generator).tolist()) for length in lengths]
        yield pack([Example(task="asr", prompt=row[:1], target=row[1:]) for row in rows])


SETTINGS = TrainingSettings(
    updates=6, accumulate=2, learning_rate=1e-2, warmup_updates=2, schedule="cosine", label_smoothing=0.1,
    checkpoint_updates=2, validate_updates=3, weight_decay=1e-3, clip_norm=0.5,
)  # fmt: skip


def full(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return convert(LlamaForCausalLM(config).to(dtype), "softmax1")


def fresh(dtype: torch.dtype = torch.float32, dropout: float = 0.0, base: Base | None = None) -> PeftModel:
    settings = LoraSettings(rank=4, alpha=8, dropout=dropout, base=base)
    return add_lora(full(torch.float32 if base else dtype), settings, dtype=dtype)


def run(model: nn.Module, folder: Path, settings: TrainingSettings = SETTINGS) -> TrainingRun:
    valid = {"asr": list(itertools.islice(stream(1000), 2)), "tts": list(itertools.islice(stream(2000), 1))}
    return TrainingRun(model, folder, settings=settings, key="key", batches=stream, validation=valid)


def plain_reference(model: nn.Module, batches: Iterator[Batch], settings: TrainingSettings) -> list[float]:
    """The same updates with torch.optim.Adam, cross_entropy and nothing else, each sequence by itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=settings.betas, weight_decay=decay)
    losses = []
    model.train()
    for update in range(settings.updates):
        group = list(itertools.islice(batches, settings.accumulate))
        targets = sum(int((b.labels != IGNORE).sum()) for b in group)
        total = 0.0
        for batch in group:
            for ids, labels in sequences(batch):
                logits = model(input_ids=ids[None]).logits[0, :-1]
                loss = nn.functional.cross_entropy(
                    logits, labels[1:], reduction="sum", label_smoothing=settings.label_smoothing
                )
                (loss / targets).backward()
                total += float(loss.detach()) / targets
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        warmup, last = settings.warmup_updates, settings.updates
        if update < warmup:
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (update + 1) / warmup
        else:
            share = (update - warmup) / (last - warmup)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def sequences(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    if batch.packed:
        yield from zip(batch.input_ids[0].split(batch.lengths), batch.labels[0].split(batch.lengths), strict=True)
    else:
        for row, length in enumerate(batch.lengths):
            yield batch.input_ids[row, :length], batch.labels[row, :length]


LONG = dataclasses.replace(SETTINGS, updates=50, warmup_updates=5, learning_rate=3e-3, checkpoint_updates=50)


@pytest.mark.parametrize("make", [fresh, full], ids=["lora", "full"])
@pytest.mark.parametrize("batches", [stream, packed_stream], ids=["padded", "packed"])
def test_same_losses_as_a_plain_loop(
    tmp_path: Path, make: Callable[[], PreTrainedModel], batches: Callable[..., Iterator[Batch]]
) -> None:
    """To 1e-5 over 50 updates in float32."""
    training = TrainingRun(make(), tmp_path, settings=LONG, key="key", batches=batches, validation={})
    training.train("test")
    assert [u.loss for u in training.log] == pytest.approx(plain_reference(make(), batches(), LONG), abs=1e-5)
    last = list(itertools.islice(batches(2 * 49), 2))
    untrained = [LanguageModelLoss(make())(batch, LONG.label_smoothing) for batch in last]
    unmoved = sum(float(x.objective.detach()) for x in untrained) / sum(x.num_targets for x in untrained)
    assert abs(training.log[-1].loss - unmoved) > 1e-3


def test_the_result_is_the_mean_of_the_best(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, validate_updates=1, average_best=3)
    training = run(fresh(), tmp_path, settings)
    training.train("test")
    ranked = sorted(training.log, key=lambda u: (-(u.valid_accuracy or 0), u.update))[:3]
    assert [update for _, update in training.progress.best] == [u.update for u in ranked]
    files = sorted((tmp_path / "best").iterdir())
    assert [int(file.stem) for file in files] == sorted(u.update for u in ranked)
    for name, parameter in trainable_parameters(training.model).items():
        torch.testing.assert_close(parameter, sum(load_file(file)[name] for file in files) / 3)


def test_training_ends_early(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, updates=40, learning_rate=0.3, validate_updates=1, patience=3)
    training = run(fresh(), tmp_path, settings)
    training.train("test")
    assert training.progress.updates == training.progress.best_update + 3 < 40
    again = run(fresh(), tmp_path, settings)
    again.train("test")
    assert again.progress.updates <= training.progress.updates


def test_the_sink_rises_from_the_pretrained_attention(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, sink_updates=4, validate_updates=1, learning_rate=1e-9, warmup_updates=0)
    pretrained = convert(full(), "vanilla", replace=True)
    expected = LanguageModelLoss(pretrained)(next(stream(1000))).nll
    training = run(full(), tmp_path, settings)
    assert training.sinks is not None
    training.sinks.set(0)
    assert training._measure([next(stream(1000))]).nll == pytest.approx(float(expected), rel=1e-6)
    training.train("test")
    assert all(layer.logit is None for layer in converted_layers(training.model))
    assert {update for _, update in training.progress.best} <= {4, 5, 6}


def cut_stream(last: int) -> Callable[[int], Iterator[Batch]]:
    """A stream during whose batch number `last` the user presses Ctrl-C."""

    def batches(skip: int) -> Iterator[Batch]:
        for number, batch in enumerate(stream(skip), start=skip):
            if number == last:
                raise KeyboardInterrupt
            yield batch

    return batches


@pytest.mark.parametrize(
    ("dtype", "base"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.bfloat16, "nf4-double")],
)
@pytest.mark.parametrize("last", [0, 1, 4, 5, 7, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, last: int, dtype: torch.dtype, base: Base | None
) -> None:
    """Cut off in any batch, between checkpoints too, with dropout: same weights, same log but for the time."""
    whole = run(fresh(dtype, dropout=0.2, base=base), tmp_path / "whole")
    whole.train("test")
    cut = run(fresh(dtype, dropout=0.2, base=base), tmp_path / "cut")
    cut.stream = cut_stream(last)(0)
    with pytest.raises(KeyboardInterrupt):
        cut.train("test")
    with cut.log_file.open("a") as file:
        file.write('{"update": 7, "tok')  # a line that a kill cut short
    resumed = run(fresh(dtype, dropout=0.2, base=base), tmp_path / "cut")
    assert resumed.progress.updates == last // 2 // 2 * 2
    resumed.train("test")
    for name, parameter in trainable_parameters(whole.model).items():
        assert torch.equal(parameter, trainable_parameters(resumed.model)[name]), name
    timeless = [[dataclasses.replace(u, seconds=0.0, speed=None) for u in r.log] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert [dataclasses.replace(u, seconds=0.0, speed=None) for u in read_log(resumed.log_file)] == timeless[0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(fresh(), tmp_path).train("test")
    with pytest.raises(SparqError, match="of a run with other settings"):
        TrainingRun(fresh(), tmp_path, settings=SETTINGS, key="another", batches=stream, validation={})


def test_the_selected_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    training = run(fresh(), tmp_path)
    training.train("test")
    best = max((u for u in training.log if u.valid_accuracy is not None), key=lambda u: u.valid_accuracy or 0)
    assert training.progress.best_update == best.update
    assert training.progress.best == ((best.valid_accuracy, best.update),)


def test_an_exploding_loss_stops_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    model = fresh()
    training = run(model, tmp_path)
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(SparqError, match="the loss is nan at update 1: lower train.learning_rate"):
        training.train("test")


def test_bfloat16_models_learn_in_float32(tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution add up in the master weights."""
    model = fresh(torch.bfloat16)
    training = run(
        model, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e-5, warmup_updates=0, weight_decay=0.0)
    )
    before = training.optimizer.whole_weights(training.names)
    before = {name: weight.clone() for name, weight in before.items()}
    training._update()
    after = training.optimizer.whole_weights(training.names)
    moved = [bool((after[n] != b).any()) for n, b in before.items() if "embed" in n]
    assert moved
    assert all(moved)


def test_the_optimizer_steps_as_adam() -> None:
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.98)}
    optimizer, reference = MasterAdam(ours.parameters(), **options), torch.optim.Adam(theirs.parameters(), **options)
    optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.01
    x = torch.randn(7, 5)

    def closure(layer: nn.Linear) -> Tensor:
        layer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(4):
        expected = reference.step(lambda: closure(theirs))
        torch.testing.assert_close(optimizer.step(lambda: closure(ours)), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.grad is None


def test_schedule() -> None:
    options = {"peak": 1.0, "warmup": 4, "total": 104}
    rates = [learning_rate(u, schedule="cosine", **options) for u in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[54] == pytest.approx(0.5)
    assert min(rates) == 0.02
    assert learning_rate(90, schedule="constant", **options) == 1.0


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt", "tiny_opt_post_norm"])
def test_lora_trains_adapters_and_vocabulary_only(family: str, request: pytest.FixtureRequest) -> None:
    model: PreTrainedModel = request.getfixturevalue(family)
    names = set(trainable_parameters(add_lora(model, LoraSettings(rank=2))))
    kinds = {n for n in names if "lora_" not in n}
    expected = {"embed_tokens"} | ({"project_in", "project_out"} if family == "tiny_opt_post_norm" else set())
    assert {n.split(".")[-2] for n in kinds} == expected
    assert sum("lora_A" in n for n in names) == 2 * (7 if family == "tiny_llama" else 6)


def test_lora_mistakes(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(SparqError, match="LoRA rank 17 exceeds layer model.layers.0.self_attn.k_proj"):
        add_lora(tiny_llama, LoraSettings(rank=17))
    with pytest.raises(SparqError, match="target 'fc9' matches no layer of llama"):
        add_lora(tiny_llama, LoraSettings(rank=2, targets=("fc9",)))
