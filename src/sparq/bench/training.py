"""Updates of `sparq train` against those of transformers' Trainer with PEFT: the same examples, in turn."""

import functools
import queue
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparq.adaptation import LoraSettings, add_lora, trainable_parameters
from sparq.adaptation.lora import quiet_peft
from sparq.bench.interleaved import Ratio, interleave
from sparq.data import IGNORE, Batch, group_packed, pack
from sparq.devices import compute_device, synchronize
from sparq.models import convert, load_model
from sparq.models.families import family_of
from sparq.pretrained.quiet import quiet_transformers
from sparq.process_memory import peak_bytes
from sparq.tokens import Example
from sparq.training import TrainingRun, TrainingSettings

Case = Literal["lora", "full"]
CASES: tuple[Case, ...] = get_args(Case)
TRAINER, PRODUCTS = "Trainer", "matrix products"
_RATE = 1e-4
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """What came out for one contender.

    Attributes:
        case: what was trained.
        contender: the Trainer, an attention of this package, or the matrix products of an update alone.
        time: of an update, by the Trainer's.
        tokens_per_second: padding left out.
        memory: bytes of weights, gradients and optimizer, and by how much an update makes the process grow; None where
            it cannot be told, and for the products.
    """

    case: Case
    contender: str
    time: Ratio
    tokens_per_second: float
    memory: int | None


def utterance_lengths(count: int, *, random: np.random.Generator) -> list[int]:
    """Draw lengths of sequences of the four tasks, as they are with LibriSpeech and a vocabulary of 5,000 pieces.

    Three quarters of the utterances last 11 to 16 seconds, the others 2 to 11; a second is some 9 pieces of speech and
    3 of text. Tasks are equally frequent.
    """
    lengths = []
    for _ in range(count):
        seconds = random.uniform(11, 16) if random.random() < 0.75 else random.uniform(2, 11)
        speech, text = int(9 * seconds), int(3 * seconds)
        lengths.append((text + 2, speech + 2, speech + text + 3, speech + text + 3)[random.integers(4)])
    return lengths


def bench_training(
    cases: Sequence[Case] = CASES, *, attentions: Sequence[str] = ("vanilla", "softmax1", "max_shift"),
    backbone: str = "pretrained:smollm2-135m", pieces: int = 5000, sequences: int = 32, row: int = 8,
    batch_tokens: int = 2000, rank: int = 64, rounds: int = 5,
) -> Iterator[TrainingSpeed]:  # fmt: skip
    """Compare updates in bfloat16 on the same examples.

    The Trainer pads batches of `row` sequences in random order and accumulates them to `sequences`; its weights are in
    float32 and its products in bfloat16 by autocast, its attention is PyTorch's. It runs as it is; between its
    updates a callback makes those of the others. `sparq train` packs the same sequences.

    All compute on the GPU where PyTorch sees one.

    Args:
        cases: `lora` adapts the backbone (rank `rank`, dropout .05, all linear layers, new embedding), `full` trains
            every weight of a model of OPT-125m's shape.
        attentions: of this package.
        backbone: of `lora`; what `load_model` takes.
        pieces: size of the vocabulary.
        sequences: examples of an update.
        row: examples of the Trainer's batch.
        batch_tokens: tokens of a packed batch at most.
        rank: of the adapters.
        rounds: how often each runs, at least 3.
    """
    random = np.random.default_rng(0)
    ids = [random.integers(5, pieces, size=n).tolist() for n in utterance_lengths(sequences, random=random)]
    examples = [Example(task="speechlm", prompt=tuple(row[:1]), target=tuple(row[1:])) for row in ids]
    groups = group_packed(examples, batch_tokens=batch_tokens, long_length=1024, random=random)
    batches = [pack(group) for group in groups]
    tokens = sum(len(example) for example in examples)
    device = compute_device()
    for case in cases:

        def build(dtype: torch.dtype, attention: str | None, case: Case = case) -> PreTrainedModel | PeftModel:
            torch.manual_seed(0)
            return (
                _lora(backbone, pieces, rank, dtype, attention) if case == "lora" else _full(pieces, dtype, attention)
            )

        with tempfile.TemporaryDirectory() as folder:
            # Before the Trainer, which gives this process's Accelerate its own precision.
            trainings = {
                attention: _sparq(build(torch.bfloat16, attention), batches, Path(folder) / attention)
                for attention in attentions
            }
            trainer = _Trainer(build(torch.float32, None), ids, row, folder)
            runs: dict[str, Callable[[], object]] = {TRAINER: trainer.update}
            runs |= {name: functools.partial(trainer.do, t._update) for name, t in trainings.items()}
            held = {TRAINER: trainer.held_bytes}
            held |= {name: functools.partial(_held, t.model, t.optimizer) for name, t in trainings.items()}
            runs[PRODUCTS] = functools.partial(trainer.do, _products(build(torch.bfloat16, None).to(device), batches))

            def measure(
                runs: Mapping[str, Callable[[], object]] = runs, held: Mapping[str, Callable[[], int]] = held
            ) -> tuple[dict[str, Ratio], dict[str, int | None]]:
                ratios = interleave(runs, baseline=TRAINER, rounds=rounds, synchronize=lambda: synchronize(device))
                return ratios, {name: peak_bytes(runs[name], device) for name in held}

            ratios, peaks = trainer.drive(measure)
            for name, ratio in ratios.items():
                peak = peaks.get(name)
                memory = None if peak is None else peak + held[name]()
                yield TrainingSpeed(
                    case=case, contender=name, time=ratio, tokens_per_second=tokens / ratio.seconds, memory=memory
                )


def _lora(backbone: str, pieces: int, rank: int, dtype: torch.dtype, attention: str | None) -> PeftModel:
    model = load_model(backbone, dtype=dtype, attention=attention)
    with quiet_transformers():
        model.resize_token_embeddings(pieces, mean_resizing=False)
    if attention is not None:
        return add_lora(model, LoraSettings(rank=rank, alpha=rank, dropout=0.05))
    targets = list(family_of(model).lora_targets)
    with quiet_peft():
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.05, target_modules=targets))
    adapted.get_input_embeddings().requires_grad_(True)
    return adapted


def _full(pieces: int, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    model = OPTForCausalLM(OPTConfig(vocab_size=pieces, dropout=0.0)).to(dtype)
    return model if attention is None else convert(model, attention)


def _sparq(model: PreTrainedModel | PeftModel, batches: list[Batch], folder: Path) -> TrainingRun:
    def endless(skip: int) -> Iterator[Batch]:
        assert skip == 0
        while True:
            yield from batches

    settings = TrainingSettings(
        updates=1_000_000, accumulate=len(batches), learning_rate=_RATE, warmup_updates=0, label_smoothing=0.0
    )
    training = TrainingRun(model, folder, settings=settings, key="bench", batches=endless, validation={})
    training.loss.train()
    return training


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of weights, gradients and the optimizer's state."""
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = [*model.parameters(), *model.buffers(), *gradients, *states]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _products(model: PreTrainedModel | PeftModel, batches: Sequence[Batch]) -> Callable[[], object]:
    """Return a call that makes all products of an update by weights, forward and backward, and nothing else."""
    trained = set(map(id, trainable_parameters(model).values()))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]

    @torch.no_grad()
    def products() -> None:
        for batch in batches:
            for layer in layers:
                # Only what has a target reaches the head.
                count = batch.num_targets if layer.out_features == model.config.vocab_size else batch.num_tokens
                x = layer.weight.new_empty(count, layer.in_features)
                y = x @ layer.weight.T
                torch.mm(y, layer.weight)
                if id(layer.weight) in trained:
                    torch.mm(y.T, x)

    return products


class _Trainer:
    """transformers' Trainer, whose updates are made one by one, by a thread that also does what others ask for.

    All that is measured has to be computed in one thread: a second one brings OpenMP threads of its own, and when there
    are more of them than cores, all sleep between operations and have to be woken: an update then takes half as long
    again.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, ids: list[list[int]], row: int, folder: str) -> None:
        self.tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=row, gradient_accumulation_steps=len(ids) // row,
            max_steps=1_000_000, learning_rate=_RATE, bf16=True, use_cpu=compute_device().type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        dataset: Any = [{"input_ids": row} for row in ids]
        self.model = model
        self.trainer = Trainer(
            model=model, args=arguments, train_dataset=dataset, data_collator=_pad, callbacks=[_Pace(self)]
        )
        self.trainer.remove_callback(PrinterCallback)

    def drive(self, measure: Callable[[], _Result]) -> _Result:
        """Call `measure` in another thread, which computes nothing itself; train, and do what it asks for, in this one.

        Meanwhile `update` and `do` can be called, from that thread alone.
        """

        def measured() -> _Result:
            try:
                return measure()
            finally:
                self.trainer.control.should_training_stop = True
                self.tasks.put(None)

        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(measured)
            try:
                self.trainer.train()
            except BaseException as error:
                self._done.put(error)  # to whoever waits for the update
            return result.result()

    def update(self) -> None:
        """Make one update of the Trainer."""
        self.tasks.put(None)
        self._wait()

    def do(self, call: Callable[[], object]) -> None:
        """Make a call in the training thread."""
        self.tasks.put(call)
        self._wait()

    def held_bytes(self) -> int:
        """Return the bytes of weights, gradients and the optimizer's state."""
        return _held(self.model, self.trainer.optimizer.optimizer)

    def _wait(self) -> None:
        error = self._done.get()
        if error is not None:
            raise error

    def before_update(self) -> None:
        """Do what is asked for until that is an update."""
        while (call := self.tasks.get()) is not None:
            call()
            self._done.put(None)

    def after_update(self) -> None:
        """Tell that the update is made."""
        self._done.put(None)


class _Pace(TrainerCallback):  # type: ignore[misc]
    def __init__(self, owner: _Trainer) -> None:
        self._owner = owner

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._owner.before_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._owner.after_update()


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = (torch.full((len(rows), length), value) for value in (1, IGNORE, 0))
    for number, row in enumerate(rows):
        end = len(row["input_ids"])
        ids[number, :end] = labels[number, :end] = torch.tensor(row["input_ids"])
        mask[number, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
