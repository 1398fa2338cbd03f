"""What an update takes, measured on a few micro-batches: memory, and time."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sparq.adaptation import trainable_parameters
from sparq.bfloat16 import fast_products
from sparq.data import Batch
from sparq.devices import synchronize
from sparq.process_memory import peak_bytes
from sparq.training.loss import LanguageModelLoss
from sparq.training.optimizer import MasterAdam
from sparq.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Bytes and seconds of a training; all of them grow linearly with the number of blocks.

    Attributes:
        weights: bytes of parameters and buffers.
        optimizer: bytes of float32 weights and Adam's moments.
        step: bytes by which an update makes the process grow beyond these: gradients, activations, products.
        micro_batch: seconds of forward and backward, a token.
        update: seconds of Adam's step.
        validation: seconds of a forward pass, a token.
    """

    weights: float
    optimizer: float
    step: float
    micro_batch: float
    update: float
    validation: float

    def with_blocks(self, count: int, *, own: int, fewer: "TrainingCost", fewer_blocks: int) -> "TrainingCost":
        """Return the cost of a model of `count` blocks from those of `own` and of `fewer_blocks`."""
        slope = (count - own) / (own - fewer_blocks)
        pairs = {name: (value, getattr(fewer, name)) for name, value in dataclasses.asdict(self).items()}
        return TrainingCost(**{name: more + slope * (more - less) for name, (more, less) in pairs.items()})


def measure_cost(
    model: PreTrainedModel | PeftModel,
    batches: Sequence[Batch],
    *,
    largest: Batch,
    settings: TrainingSettings,
    seconds: float,
) -> TrainingCost | None:
    """Train for some seconds at a learning rate of 0; None where nothing tells how much memory that takes.

    Args:
        model: on the device, of any weights.
        batches: micro-batches as they come, which are gone through from the first.
        largest: the one that takes most memory.
        settings: of the training.
        seconds: how long forward and backward are timed; two micro-batches at least.
    """
    loss = LanguageModelLoss(model, settings.penalty(model)).train()
    parameters = trainable_parameters(model).values()
    optimizer = MasterAdam(parameters, weight_decay=0.0, betas=(0.9, 0.98))
    device = next(iter(parameters)).device

    def learn(batch: Batch) -> None:
        loss(batch.to(device), settings.label_smoothing).objective.backward()

    def update() -> float:
        return optimizer.update(rate=0.0, gradient_scale=1.0, clip_norm=1.0)

    def whole_update() -> None:
        # The second micro-batch finds the gradients of the first.
        for _ in range(min(2, settings.accumulate)):
            learn(largest)
        update()

    taken: dict[str, float] = {}

    def train() -> None:
        learn(largest)
        update()
        whole_update()
        # Batches of many sizes leave holes in the process's memory, which count.
        tokens, spent = _timed(learn, batches, device, seconds=seconds)
        taken["micro_batch"] = spent / tokens
        taken["update"] = _clock(update, device)
        loss.eval()
        with torch.no_grad():
            tokens, spent = _timed(lambda batch: loss(batch.to(device)), batches, device, seconds=seconds / 4)
        taken["validation"] = spent / tokens
        loss.train()
        whole_update()

    with fast_products(device, model.dtype, model):
        grown = peak_bytes(train, device)
    if grown is None:
        return None
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    held = _storages([*model.parameters(), *model.buffers()])
    # Parameters in float32 are their own master weights.
    states = float(sum(size for place, size in _storages(moments).items() if place not in held))
    return TrainingCost(weights=float(sum(held.values())), optimizer=states, step=grown - states, **taken)


def _timed(
    run: Callable[[Batch], object], batches: Sequence[Batch], device: torch.device, *, seconds: float
) -> tuple[int, float]:
    """Return how many tokens were run in about so many seconds, and the time that took."""
    tokens, spent = 0, 0.0
    for number, batch in enumerate(itertools.cycle(batches)):
        if number >= 2 and spent >= seconds:
            break
        spent += _clock(lambda batch=batch: run(batch), device)  # type: ignore[misc]
        tokens += batch.num_tokens
    return tokens, spent


def _clock(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
