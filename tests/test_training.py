"""The loop against a plain reference, exact resume, and what is trained."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparq.adaptation import LoraSettings, add_lora, trainable_parameters
from sparq.data import IGNORE, Batch, collate
from sparq.errors import SparqError
from sparq.tokens import Example
from sparq.training import TrainingRun, TrainingSettings, read_log, target_loss
from sparq.training.optimizer import learning_rate


def stream(skip: int = 0) -> Iterator[Batch]:
    for number in itertools.count(skip):
        generator = torch.Generator().manual_seed(number)
        draw = torch.randint(5, 96, (4, 12), generator=generator)
        rows = [tuple(row.tolist()) for row in draw]
        examples = [Example(task="asr", prompt=r[: 3 + i], target=r[3 + i :]) for i, r in enumerate(rows)]
        yield collate(examples, pad_id=0)


SETTINGS = TrainingSettings(
    updates=6, accumulate=2, learning_rate=1e-2, warmup_updates=2, schedule="cosine", label_smoothing=0.1,
    checkpoint_updates=2, validate_updates=3, weight_decay=1e-3, clip_norm=0.5,
)  # fmt: skip


def fresh(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    return add_lora(model, LoraSettings(rank=4, alpha=8, dropout=dropout))


def run(model: nn.Module, folder: Path, settings: TrainingSettings = SETTINGS) -> TrainingRun:
    valid = list(itertools.islice(stream(1000), 2))
    return TrainingRun(model, folder, settings=settings, key="key", batches=stream, validation=valid)


def plain_reference(model: nn.Module) -> list[float]:
    """The same updates with torch.optim.Adam, cross_entropy and nothing else; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-3)
    batches, losses = stream(), []
    model.train()
    for update in range(6):
        group = list(itertools.islice(batches, 2))
        targets = sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in group)
        total = 0.0
        for batch in group:
            logits = model(input_ids=batch.input_ids).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.1
            )
            (loss / targets).backward()
            total += float(loss.detach()) / targets
        nn.utils.clip_grad_norm_(parameters, 0.5)
        if update < 2:
            optimizer.param_groups[0]["lr"] = 1e-2 * (update + 1) / 2
        else:
            optimizer.param_groups[0]["lr"] = 1e-2 * max(0.02, 0.5 * (1 + math.cos(math.pi * (update - 2) / 4)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def test_same_losses_as_a_plain_loop(tmp_path: Path) -> None:
    training = run(fresh(), tmp_path)
    training.train("test")
    assert [u.loss for u in training.log] == pytest.approx(plain_reference(fresh()), abs=1e-5)


def cut_stream(last: int) -> Callable[[int], Iterator[Batch]]:
    """A stream during whose batch number `last` the user presses Ctrl-C."""

    def batches(skip: int) -> Iterator[Batch]:
        for number, batch in enumerate(stream(skip), start=skip):
            if number == last:
                raise KeyboardInterrupt
            yield batch

    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [0, 1, 4, 5, 7, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, last: int, dtype: torch.dtype) -> None:
    """Cut off in any batch, between checkpoints too, with dropout: same weights, same log but for the time."""
    whole = run(fresh(dtype, dropout=0.2), tmp_path / "whole")
    whole.train("test")
    cut = run(fresh(dtype, dropout=0.2), tmp_path / "cut")
    cut.stream = cut_stream(last)(0)
    with pytest.raises(KeyboardInterrupt):
        cut.train("test")
    with cut.log_file.open("a") as file:
        file.write('{"update": 7, "tok')  # a line that a kill cut short
    resumed = run(fresh(dtype, dropout=0.2), tmp_path / "cut")
    assert resumed.progress.updates == last // 2 // 2 * 2
    resumed.train("test")
    for name, parameter in trainable_parameters(whole.model).items():
        assert torch.equal(parameter, trainable_parameters(resumed.model)[name]), name
    timeless = [[dataclasses.replace(u, seconds=0.0) for u in r.log] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert [dataclasses.replace(u, seconds=0.0) for u in read_log(resumed.log_file)] == timeless[0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(fresh(), tmp_path).train("test")
    with pytest.raises(SparqError, match="of a run with other settings"):
        TrainingRun(fresh(), tmp_path, settings=SETTINGS, key="another", batches=stream, validation=[])


def test_the_selected_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    training = run(fresh(), tmp_path)
    training.train("test")
    best = max((u for u in training.log if u.valid_accuracy is not None), key=lambda u: u.valid_accuracy or 0)
    assert training.progress.best_update == best.update
    assert training.progress.best_accuracy == best.valid_accuracy


def test_an_exploding_loss_stops_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    model = fresh()
    training = run(model, tmp_path)
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(SparqError, match="the loss is nan at update 1: lower train.learning_rate"):
        training.train("test")


def test_label_smoothing_equals_torch() -> None:
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[:, :3] = IGNORE
    ours = target_loss(logits, labels, smoothing=0.3)
    theirs = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3, reduction="sum"
    )
    torch.testing.assert_close(ours.objective, theirs)
    assert ours.num_targets == 3 * 4


def test_bfloat16_models_learn_in_float32(tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution add up in the master weights."""
    model = fresh(torch.bfloat16)
    training = run(
        model, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e-5, warmup_updates=0, weight_decay=0.0)
    )
    before = {n: m.detach().clone() for n, m in training.optimizer.masters.items()}
    training._update()
    moved = [bool((training.optimizer.masters[n] != b).any()) for n, b in before.items() if "embed" in n]
    assert moved
    assert all(moved)


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
