"""The training loop: exact gradient accumulation, validation, checkpoints, resume, on one process or several."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparq.adaptation import trainable_parameters
from sparq.attention import SinkSchedule
from sparq.bfloat16 import fast_products
from sparq.data import Batch
from sparq.errors import SparqError
from sparq.files import remove, write_text
from sparq.process_memory import trim_heap
from sparq.progress import progress
from sparq.training.best import BestWeights, insert
from sparq.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from sparq.training.flops import ModelFlops, matmul_rate
from sparq.training.lean import keep_less
from sparq.training.log import Speed, Update, read_log
from sparq.training.loss import LanguageModelLoss
from sparq.training.optimizer import MasterAdam, learning_rate
from sparq.training.outlier_watch import OutlierWatch, ValidOutliers
from sparq.training.parallel import Workers
from sparq.training.profiling import UpdateProfile
from sparq.training.settings import TrainingSettings

_RANDOM_STATES = "random_states"


class _Measured(NamedTuple):
    """Sums over a validation set: negative log-likelihoods, correct targets, and all; and its outliers."""

    nll: float
    correct: float
    targets: float
    outliers: ValidOutliers


class TrainingRun:
    """A run that lives in a folder and continues from where that folder is.

    ```
    checkpoint/          the last state (removed by the caller when the model is saved)
    best/                the weights with the highest validation accuracies (likewise)
    train.jsonl          one `Update` a line
    profile.txt          the time of every operation, if that is wanted
    sparq/               TensorBoard's events, likewise
    ```

    With several processes each of them makes the same run; the main one writes.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        folder: Path,
        *,
        settings: TrainingSettings,
        key: str,
        batches: Callable[[int], Iterator[Batch]],
        validation: Mapping[str, Sequence[Batch]],
    ) -> None:
        """Restore the checkpoint if there is one.

        Args:
            model: with the parameters to train marked by `requires_grad`.
            folder: where the run lives.
            settings: how to train.
            key: fingerprint of all that the result depends on.
            batches: gives the stream of micro-batches from a given number on.
            validation: batches to select by, of each task; may be empty.

        Raises:
            SparqError: the checkpoint is of other settings, the processes cannot share an update's micro-batches, or a
                tracker is not installed.
        """
        keep_less(model)
        self.model = model
        self.folder = folder
        self.settings = settings
        self.validation = validation
        self.workers = Workers(accumulate=settings.accumulate, loggers=settings.loggers, folder=folder)
        self.sinks = SinkSchedule(model, updates=settings.sink_updates) if settings.sink_updates else None
        parameters = trainable_parameters(model)
        self.names = list(parameters)
        self.flops, self.dtype = ModelFlops.of(model), model.dtype
        self.optimizer = MasterAdam(parameters.values(), weight_decay=settings.weight_decay, betas=settings.betas)
        self.outliers = OutlierWatch(model)
        self.loss = self.workers.share(LanguageModelLoss(model, settings.penalty(model)), self.optimizer)
        restored = load_checkpoint(folder / "checkpoint", key)
        if restored is None:
            self.progress = Progress(key=key)
            self.log: list[Update] = []
            self.workers.set_random(None)
        else:
            self.progress, tensors = restored
            self.workers.set_random(tensors.pop(_RANDOM_STATES))
            self.optimizer.load_whole_state(self.names, tensors)
            self.log = read_log(folder / "train.jsonl")[: self.progress.updates]
        if self.workers.is_main:
            write_text(self.log_file, "".join(update.to_line() for update in self.log))
        self.best = BestWeights(folder / "best")
        self._saved_best = self.progress.best
        self.stream = batches(self.progress.batches)

    @property
    def log_file(self) -> Path:
        """The log, one JSON object an update."""
        return self.folder / "train.jsonl"

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of every weight."""
        return any(isinstance(parameter, DTensor) for parameter in self.optimizer.parameters)

    @functools.cached_property
    def peak(self) -> float:
        """Operations a second that the processes together do in plain products."""
        (rate,) = self.workers.total([matmul_rate(self.workers.device, self.dtype)])
        return rate

    def remove_state(self) -> None:
        """Remove all but the log."""
        remove(self.folder / "best")
        # Last, because without it a run that was killed here would start over.
        remove(self.folder / "checkpoint")

    def train(self, label: str) -> None:
        """Go on to the last update, then load the selected weights into the model.

        Raises:
            SparqError: the loss is not finite.
        """
        settings = self.settings
        self.loss.train()
        profile = UpdateProfile(settings.profile, self.folder / "profile.txt") if settings.profile else None
        bar = progress(label, total=settings.last_update, unit="update", initial=self.progress.updates)
        with bar, self.workers.logging():
            while self.progress.updates < settings.last_update and not self._is_out_of_patience():
                if profile is not None:
                    profile.before()
                update = self._update()
                if profile is not None:
                    profile.after()
                number = self.progress.updates
                # The first is where the curves begin.
                if self.validation and (number % settings.validate_updates == 0 or number in (1, settings.last_update)):
                    update = self._validate(update)
                self.log.append(update)
                if self.workers.is_main:
                    with self.log_file.open("a", encoding="utf-8") as file:
                        file.write(update.to_line())
                self.workers.log(update)
                if number % settings.checkpoint_updates == 0 or number == settings.last_update:
                    self._save_checkpoint()
                bar.set_postfix_str(_postfix(update))
                bar.update()
        if self.progress.best:
            self._load_best()
        self.loss.eval()

    def _update(self) -> Update:
        settings, peak = self.settings, self.peak
        start = time.perf_counter()
        if self.sinks is not None:
            self.sinks.set(self.progress.updates)
        sums: list[float | Tensor] = [0.0] * 7
        micro_batches = list(self.workers.own(itertools.islice(self.stream, settings.accumulate)))
        for number, batch in enumerate(micro_batches, start=1):
            with (
                fast_products(self.workers.device, self.dtype, self.model),
                self.workers.micro_batch(self.loss, last=number == len(micro_batches)),
            ):
                loss = self.loss(batch, settings.label_smoothing)
                trim_heap(loss.objective.device)
                loss.objective.backward()
                trim_heap(loss.objective.device)
            own = (loss.objective.detach(), loss.nll, loss.num_targets, batch.num_tokens)
            work = (batch.seconds, self.flops.of_batch(batch), 0.0 if loss.penalty is None else loss.penalty)
            sums = [a + b for a, b in zip(sums, (*own, *work), strict=True)]
        objective, nll, targets, tokens, speech, flops, penalty = self.workers.total(sums)
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
        # Processes' gradients were averaged, but the loss is a sum.
        scale = self.workers.count / targets
        norm = self.optimizer.update(rate=rate, gradient_scale=scale, clip_norm=settings.clip_norm)
        seconds = time.perf_counter() - start
        self.progress = dataclasses.replace(
            self.progress,
            updates=self.progress.updates + 1,
            batches=self.progress.batches + settings.accumulate,
            tokens=self.progress.tokens + int(tokens),
            seconds=self.progress.seconds + seconds,
        )
        return Update(
            update=self.progress.updates,
            tokens=self.progress.tokens,
            seconds=round(self.progress.seconds, 3),
            loss=objective / targets,
            nll=nll / targets,
            learning_rate=rate,
            gradient_norm=norm,
            penalty=penalty / targets if loss.penalty is not None else None,
            epochs=micro_batches[-1].epochs,
            speed=Speed(tokens=tokens / seconds, speech=speech / seconds, mfu=flops / seconds / peak),
        )

    def _validate(self, update: Update) -> Update:
        number = self.progress.updates
        if self.sinks is not None:
            self.sinks.set(number)
        tasks = {task: self._measure(batches) for task, batches in self.validation.items()}
        targets = sum(measured.targets for measured in tasks.values())
        nll = sum(measured.nll for measured in tasks.values()) / targets
        accuracy = sum(measured.correct for measured in tasks.values()) / targets
        if number >= self.settings.sink_updates:
            self._keep_if_best(accuracy, number)
        return dataclasses.replace(
            update,
            valid_nll=nll,
            valid_accuracy=accuracy,
            valid_tasks={task: (m.nll / m.targets, m.correct / m.targets) for task, m in tasks.items()},
            valid_outliers={task: measured.outliers for task, measured in tasks.items()},
        )

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch]) -> _Measured:
        self.loss.eval()
        sums: list[float | Tensor] = [0.0, 0.0, 0.0]
        # Sharded models want every process to call as often, so all do all; validation sets are small.
        with fast_products(self.workers.device, self.dtype, self.model):
            for batch in batches:
                with self.outliers.watching(batch):
                    loss = self.loss(batch.to(self.workers.device))
                sums = [a + b for a, b in zip(sums, (loss.nll, loss.num_correct, loss.num_targets), strict=True)]
        self.loss.train()
        nll, correct, targets = (float(number) for number in sums)
        return _Measured(nll=nll, correct=correct, targets=targets, outliers=self.outliers.take())

    def _keep_if_best(self, accuracy: float, number: int) -> None:
        best = insert(self.progress.best, accuracy, number, count=self.settings.average_best)
        self.progress = dataclasses.replace(self.progress, best=best)
        if (accuracy, number) not in best:
            return
        weights = self.optimizer.whole_weights(self.names)
        if self.workers.is_main:
            self.best.save(number, weights)
            # Those that the last checkpoint names are needed if this process dies before the next.
            self.best.prune(best, self._saved_best)

    def _load_best(self) -> None:
        self.workers.wait()
        weights = dict(self.best.mean(self.progress.best))
        self.optimizer.load_whole_state(self.names, {f"weight/{name}": weight for name, weight in weights.items()})

    def _save_checkpoint(self) -> None:
        tensors = {**self.optimizer.whole_state(self.names), _RANDOM_STATES: self.workers.random_states()}
        self._saved_best = self.progress.best
        if self.workers.is_main:
            save_checkpoint(self.folder / "checkpoint", self.progress, tensors)
            self.best.prune(self._saved_best)

    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        if patience is None or not self.progress.best:
            return False
        later = [u for u in self.log if u.valid_accuracy is not None and u.update > self.progress.best_update]
        return len(later) >= patience


def _postfix(update: Update) -> str:
    """Return what the progress bar says of an update; h/h are hours of speech an hour."""
    speed = update.speed
    assert speed is not None
    return f"loss {update.loss:.3f}, {speed.tokens:.0f} tokens/s, {speed.speech:.3g} h/h, MFU {100 * speed.mfu:.0f} %"
