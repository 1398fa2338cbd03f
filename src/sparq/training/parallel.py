"""One or several processes, through Accelerate: who does which micro-batches, and what they tell each other.

Accelerate reads from its launcher, or torchrun's, how many processes there are and how they share the model:
replicated (DDP), or sharded (FSDP2, `accelerate launch --use_fsdp --fsdp_version 2`).
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sparq.data import Batch
from sparq.errors import SparqError
from sparq.training.log import Update
from sparq.training.optimizer import MasterAdam
from sparq.training.trackers import Tracker, check_installed, scalars


class Workers:
    """The processes of a training, of which this is one.

    Args:
        accumulate: micro-batches of an update, shared out evenly.
        loggers: trackers that `log` tells.
        folder: where a tracker writes that wants a folder.

    Raises:
        SparqError: micro-batches cannot be shared, or a tracker is not installed.
    """

    def __init__(self, *, accumulate: int, loggers: Sequence[Tracker] = (), folder: Path | None = None) -> None:
        check_installed(loggers)
        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            # Somebody's autocast, such as transformers' Trainer's, would be this training's too.
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available(), log_with=list(loggers) or None, project_dir=folder
        )
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        if accumulate % self.count:
            right = accumulate + -accumulate % self.count
            raise SparqError(
                f"train.accumulate is {accumulate}, which {self.count} processes cannot share: set it to a multiple of"
                f" {self.count}, {right} say"
            )

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Open the trackers, and close them whatever happens."""
        if self.accelerator.log_with:
            self.accelerator.init_trackers("sparq")
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers.clear()

    def log(self, update: Update) -> None:
        """Tell the trackers about an update."""
        if self.accelerator.trackers:
            self.accelerator.log(scalars(update), step=update.update)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    def share(self, model: nn.Module, optimizer: MasterAdam) -> nn.Module:
        """Return the model as it is to be called, on this process's device; the optimizer follows it."""
        shared: nn.Module
        shared, _ = self.accelerator.prepare(model, optimizer)
        return shared

    def own(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this process's share of some batches, on its device."""
        for batch in itertools.islice(batches, self.rank, None, self.count):
            yield batch.to(self.device)

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Wrap forward and backward; gradients of all processes are averaged in the last micro-batch of an update."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def total(self, numbers: list[float | Tensor]) -> list[float]:
        """Return the sums over all processes."""
        own = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=self.device)
        sums: list[float] = self.accelerator.reduce(own, reduction="sum").tolist()
        return sums

    def random_states(self) -> Tensor:
        """Return the state of every process's random numbers, those of its device, a row each."""
        cuda = self.device.type == "cuda"
        state = torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()
        states: Tensor = self.accelerator.gather(state[None].to(self.device))
        return states.cpu()

    def set_random(self, states: Tensor | None) -> None:
        """Continue this process's random numbers; where it has none, or others had them, processes differ by number."""
        if states is not None and len(states) == self.count:
            set_state = torch.cuda.set_rng_state if self.device.type == "cuda" else torch.set_rng_state
            # PyTorch 2.13 reads a state from the beginning of its storage, whatever row of it is meant.
            set_state(states[self.rank].clone())
        elif self.rank > 0:
            torch.manual_seed(torch.initial_seed() + self.rank)

    def wait(self) -> None:
        """Go on when all have come here."""
        self.accelerator.wait_for_everyone()
