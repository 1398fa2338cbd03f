"""What the training of a recipe will take, before it runs: parameters, memory and time of each framework.

Parameters are counted on a model without storage. Memory and time are measured on this machine, with random weights, on
a few micro-batches of the recipe's shape. Where the whole model would take too long or too much memory, two models of
fewer blocks are measured, and the straight line through them gives that of all blocks.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

import psutil
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sparq.adaptation import add_lora, count_parameters, trainable_parameters
from sparq.data import Batch
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.models import convert
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.train_step import DTYPES, lora_settings, training_settings
from sparq.recipes.training_shapes import Shapes, training_shapes
from sparq.training.cost import TrainingCost, measure_cost
from sparq.training.flops import ModelFlops, matmul_rate

_SECONDS = 8.0
"""How long forward and backward of a framework are timed."""

_LONGEST = 4.0
"""Seconds that forward and backward of the largest micro-batch may take, by the count of operations."""

_EFFICIENCY = 0.4
"""Share of the speed of plain products that such a pass is assumed to reach, to choose the number of blocks."""


@dataclass(frozen=True, kw_only=True)
class FrameworkPlan:
    """What the training of one framework will take.

    Attributes:
        framework: the attention.
        trained: parameters that are trained.
        parameters: all of them, a tied one counted once.
        process: bytes of the process before it has a model.
        cost: memory and time, measured; None where the system does not tell its memory.
        measured_blocks: blocks of the models that were measured.
        blocks: blocks of the model.
    """

    framework: str
    trained: int
    parameters: int
    process: int
    cost: TrainingCost
    measured_blocks: tuple[int, ...]
    blocks: int

    @property
    def memory(self) -> float:
        """Bytes of the process at the peak."""
        return self.process + self.cost.weights + self.cost.optimizer + self.cost.step


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What the trainings of a recipe will take, one after another."""

    recipe: Recipe
    shapes: Shapes
    frameworks: tuple[FrameworkPlan, ...]

    @property
    def update_tokens(self) -> float:
        """Tokens of an update."""
        return self.shapes.batch_tokens * self.recipe.train.accumulate

    def seconds(self, framework: FrameworkPlan) -> tuple[float, float]:
        """Return the time of a framework's updates, and of its validations."""
        train, cost = self.recipe.train, framework.cost
        updates = train.updates * (self.update_tokens * cost.micro_batch + cost.update)
        validations = math.ceil(train.updates / train.validate_updates) + (train.validate_updates > 1 < train.updates)
        return updates, validations * (self.shapes.validation_tokens or 0) * cost.validation

    def text(self) -> str:
        """Return it as people read it."""
        train, shapes = self.recipe.train, self.shapes
        epoch = "" if shapes.epoch_tokens is None else f", {shapes.epoch_tokens / self.update_tokens:.3g} an epoch"
        lines = [
            f"{self.recipe.name}: {train.updates:,} updates{epoch}, of {self.update_tokens:,.0f} tokens each"
            f" ({train.accumulate} x {shapes.batch_tokens:,.0f}); {shapes.source}",
            "",
            "| framework | trained | of | weights | optimizer | update | peak memory | tokens/s | update | training |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for framework in self.frameworks:
            cost, (updating, validating) = framework.cost, self.seconds(framework)
            update = updating / train.updates
            lines.append(
                f"| {framework.framework} | {framework.trained:,} | {framework.parameters:,} | {_size(cost.weights)} |"
                f" {_size(cost.optimizer)} | {_size(cost.step)} | {_size(framework.memory)} |"
                f" {self.update_tokens / update:,.0f} | {update:.3g} s | {_time(updating + validating)} |"
            )
        validating = sum(self.seconds(framework)[1] for framework in self.frameworks)
        total = sum(sum(self.seconds(framework)) for framework in self.frameworks)
        measured = self.frameworks[0]
        how = f"{measured.blocks} blocks"
        if len(measured.measured_blocks) > 1:
            how = f"{measured.measured_blocks[0]} and {measured.measured_blocks[1]} of {measured.blocks} blocks"
        lines += [
            "",
            f"All: {_time(total)}, {_time(validating)} of it for validation. Peak memory has {_size(measured.process)}"
            f" of the process besides. Measured now with random weights on {how}.",
        ]
        return "\n".join(lines)


def plan_training(recipe: Recipe, run: RunFolder | None) -> TrainingPlan:
    """Measure what training will take; nothing is written.

    Args:
        recipe: the recipe.
        run: a run whose units and vocabulary give the lengths of the sequences; else these are assumed.

    Raises:
        SparqError: there is no such backbone, something about the recipe does not fit it, or the system does not tell
            how much memory a process takes.
    """
    set_threads(recipe)
    shapes = training_shapes(recipe, run)
    reference = resolve_model(recipe.model.backbone)
    try:
        config = AutoConfig.from_pretrained(reference)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SparqError(f"cannot read the configuration of {recipe.model.backbone!r}: {reason}") from error
    # Before the first model: what later ones leave behind is not of the process as it starts.
    process = psutil.Process().memory_info().rss
    plans = (_plan_framework(recipe, framework, config, shapes, process=process) for framework in recipe.frameworks)
    return TrainingPlan(recipe=recipe, shapes=shapes, frameworks=tuple(plans))


def _plan_framework(
    recipe: Recipe, framework: str, config: PretrainedConfig, shapes: Shapes, *, process: int
) -> FrameworkPlan:
    blocks = config.num_hidden_layers
    with torch.device("meta"):
        counted = _build(recipe, framework, config, pieces=shapes.pieces, blocks=blocks)
    trained = count_parameters(list(trainable_parameters(counted).values()))
    most = _most_blocks(recipe, counted, blocks, shapes.largest)
    device = compute_device()

    def measure(count: int) -> TrainingCost:
        with device:
            model = _build(recipe, framework, config, pieces=shapes.pieces, blocks=count)
        cost = measure_cost(
            model,
            shapes.batches,
            largest=shapes.largest,
            settings=training_settings(recipe, framework),
            seconds=_SECONDS,
        )
        if cost is None:
            raise SparqError("this system does not tell how much memory a process takes: --plan needs Linux or CUDA")
        return cost

    measured: tuple[int, ...] = (most,)
    cost = measure(most)
    if most < blocks:
        fewer = most // 2
        cost = cost.with_blocks(blocks, own=most, fewer=measure(fewer), fewer_blocks=fewer)
        measured = (fewer, most)
    return FrameworkPlan(
        framework=framework,
        trained=trained,
        parameters=count_parameters(list(counted.parameters())),
        process=process,
        cost=cost,
        measured_blocks=measured,
        blocks=blocks,
    )


def _build(
    recipe: Recipe, framework: str, config: PretrainedConfig, *, pieces: int, blocks: int
) -> PreTrainedModel | PeftModel:
    """Return a model as `train` trains it, of random weights, on the device that PyTorch makes tensors on."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    lora, dtype = lora_settings(recipe), DTYPES[recipe.train.dtype]
    on_meta = torch.get_default_device().type == "meta"
    if lora is not None:
        # What the adapters start from changes no shape; on meta there is nothing to round.
        base = None if on_meta else lora.base
        lora = dataclasses.replace(lora, initialization="kaiming", base=base)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if lora and lora.reads_weights else dtype, attn_implementation="sdpa"
        )
        model.resize_token_embeddings(pieces, mean_resizing=False)
    model.get_input_embeddings().padding_idx = None
    convert(model, framework)
    return model if lora is None else add_lora(model, lora, dtype=dtype)


def _most_blocks(recipe: Recipe, model: PreTrainedModel | PeftModel, blocks: int, largest: Batch) -> int:
    """Return how many blocks can be measured in the time and memory that there is, two at least."""
    device = compute_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    dtype = DTYPES[recipe.train.dtype]
    seconds = ModelFlops.of(model).of_batch(largest) / (_EFFICIENCY * matmul_rate(device, dtype))
    # Weights, and for what is trained gradients, Adam's moments and float32 copies of weights and gradients.
    held = sum((dtype.itemsize + (20 if p.requires_grad else 0)) * p.numel() for p in model.parameters())
    share: float = min(1.0, _LONGEST / seconds, 0.5 * free / held)
    return min(blocks, max(2, math.floor(share * blocks)))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02d} min"
