"""The training loop: exact gradient accumulation, validation, checkpoints, resume."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparq.adaptation import trainable_parameters
from sparq.data import Batch
from sparq.errors import SparqError
from sparq.files import atomic_path, write_text
from sparq.progress import progress
from sparq.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from sparq.training.loss import batch_loss
from sparq.training.optimizer import MasterAdam, Schedule, learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train; the defaults are the papers' (appendix E.1 and VoxtLM's recipe).

    Attributes:
        updates: optimizer steps.
        accumulate: micro-batches an update.
        learning_rate: peak rate.
        warmup_updates: updates of linear warm-up.
        schedule: what follows the warm-up.
        weight_decay: Adam's L2 term.
        betas: Adam's decay rates.
        clip_norm: bound on the gradient's norm.
        label_smoothing: share of the uniform distribution in the targets.
        checkpoint_updates: updates between two checkpoints.
        validate_updates: updates between two validations.
        stop_after: end early after so many updates, with the schedule still as for `updates`.
    """

    updates: int
    accumulate: int = 40
    learning_rate: float = 3e-4
    warmup_updates: int = 2500
    schedule: Schedule = "constant"
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    checkpoint_updates: int = 100
    validate_updates: int = 100
    stop_after: int | None = None

    @property
    def last_update(self) -> int:
        """The number of the last update."""
        return self.updates if self.stop_after is None else min(self.stop_after, self.updates)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One line of the log: one update, its losses in nats per target token."""

    update: int
    tokens: int
    seconds: float
    loss: float
    nll: float
    learning_rate: float
    gradient_norm: float
    valid_nll: float | None = None
    valid_accuracy: float | None = None


class TrainingRun:
    """A run that lives in a folder and continues from where that folder is.

    ```
    checkpoint/        the last state (removed by the caller when the model is saved)
    best.safetensors   the weights with the highest validation accuracy
    train.jsonl        one `Update` a line
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        settings: TrainingSettings,
        key: str,
        batches: Callable[[int], Iterator[Batch]],
        validation: Sequence[Batch],
    ) -> None:
        """Restore the checkpoint if there is one.

        Args:
            model: with the parameters to train marked by `requires_grad`.
            folder: where the run lives.
            settings: how to train.
            key: fingerprint of all that the result depends on.
            batches: gives the stream of micro-batches from a given number on.
            validation: batches to select by; may be empty.
        """
        self.model = model
        self.folder = folder
        self.settings = settings
        self.validation = validation
        self.optimizer = MasterAdam(
            trainable_parameters(model), weight_decay=settings.weight_decay, betas=settings.betas
        )
        restored = load_checkpoint(folder / "checkpoint", key)
        if restored is None:
            self.progress = Progress(key=key)
            self.log: list[Update] = []
        else:
            self.progress, tensors = restored
            self.optimizer.load_state(tensors)
            self.log = read_log(folder / "train.jsonl")[: self.progress.updates]
        write_text(self.log_file, "".join(_line(update) for update in self.log))
        self.stream = batches(self.progress.batches)

    @property
    def log_file(self) -> Path:
        """The log, one JSON object an update."""
        return self.folder / "train.jsonl"

    @property
    def best_file(self) -> Path:
        """The selected weights."""
        return self.folder / "best.safetensors"

    def train(self, label: str) -> None:
        """Go on to the last update, then load the selected weights into the model.

        Raises:
            SparqError: the loss is not finite.
        """
        settings = self.settings
        self.model.train()
        with progress(label, total=settings.last_update, unit="update", initial=self.progress.updates) as bar:
            while self.progress.updates < settings.last_update:
                update = self._update()
                number = self.progress.updates
                if self.validation and (number % settings.validate_updates == 0 or number == settings.last_update):
                    update = self._validate(update)
                self.log.append(update)
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(_line(update))
                if number % settings.checkpoint_updates == 0 or number == settings.last_update:
                    save_checkpoint(self.folder / "checkpoint", self.progress, self.optimizer.state())
                rate = self.progress.tokens / max(self.progress.seconds, 1e-9)
                bar.set_postfix_str(f"loss {update.loss:.3f}, {rate:.0f} tokens/s")
                bar.update()
        if self.best_file.exists():
            self._load_weights(self.best_file)
        self.model.eval()

    def _update(self) -> Update:
        start = time.perf_counter()
        settings = self.settings
        objective, nll, targets, tokens = 0.0, 0.0, 0, 0
        for batch in itertools.islice(self.stream, settings.accumulate):
            loss = batch_loss(self.model, batch, smoothing=settings.label_smoothing)
            loss.objective.backward()  # type: ignore[no-untyped-call]
            objective += float(loss.objective.detach())
            nll += loss.nll
            targets += loss.num_targets
            tokens += batch.input_ids.numel()
        if not math.isfinite(objective):
            raise SparqError(
                f"the loss is {objective} at update {self.progress.updates + 1}: lower train.learning_rate"
                f" ({settings.learning_rate:g}); the last good checkpoint is kept in {self.folder}"
            )
        rate = learning_rate(
            self.progress.updates,
            peak=settings.learning_rate,
            warmup=settings.warmup_updates,
            total=settings.updates,
            schedule=settings.schedule,
        )
        norm = self.optimizer.step(rate=rate, gradient_scale=1 / targets, clip_norm=settings.clip_norm)
        self.progress = dataclasses.replace(
            self.progress,
            updates=self.progress.updates + 1,
            batches=self.progress.batches + settings.accumulate,
            tokens=self.progress.tokens + tokens,
            seconds=self.progress.seconds + time.perf_counter() - start,
        )
        return Update(
            update=self.progress.updates,
            tokens=self.progress.tokens,
            seconds=round(self.progress.seconds, 3),
            loss=objective / targets,
            nll=nll / targets,
            learning_rate=rate,
            gradient_norm=norm,
        )

    def _validate(self, update: Update) -> Update:
        nll, accuracy = validate(self.model, self.validation)
        if accuracy > self.progress.best_accuracy:
            self.progress = dataclasses.replace(
                self.progress, best_accuracy=accuracy, best_update=self.progress.updates
            )
            with atomic_path(self.best_file) as temporary:
                masters = {name: master.detach().contiguous() for name, master in self.optimizer.masters.items()}
                save_file(masters, temporary)
        return dataclasses.replace(update, valid_nll=nll, valid_accuracy=accuracy)

    @torch.no_grad()
    def _load_weights(self, file: Path) -> None:
        for name, tensor in load_file(file).items():
            self.optimizer.masters[name].copy_(tensor)
        self.optimizer.copy_to_model()


@torch.no_grad()
def validate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return the negative log-likelihood per target token in nats and the next-token accuracy in [0, 1]."""
    training = model.training
    model.eval()
    losses = [batch_loss(model, batch) for batch in batches]
    model.train(training)
    targets = sum(loss.num_targets for loss in losses)
    return sum(loss.nll for loss in losses) / targets, sum(loss.num_correct for loss in losses) / targets


def _line(update: Update) -> str:
    return json.dumps(dataclasses.asdict(update)) + "\n"


def read_log(file: Path) -> list[Update]:
    """Read a training log; a last line that a kill cut short is left out."""
    updates = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            updates.append(Update(**json.loads(line)))
        except json.JSONDecodeError:
            break
    return updates
