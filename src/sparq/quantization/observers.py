"""What calibration data shows about the inputs of linear layers."""

from collections.abc import Callable, Iterable, Mapping, Sized

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.progress import progress

CalibrationBatch = Int[Tensor, "_ _"] | Mapping[str, Tensor]
"""Token ids [batch, length], or a mapping with `input_ids` and, where it is padded, `attention_mask`.

`labels`, -100 where a token is no target of the training, are used by `best` (`distillation.py`) alone.
"""

Observer = Callable[[str, Float[Tensor, "_ _"]], None]
"""Receives the name of a layer and its inputs for one batch, [tokens, channels], padding left out."""


@torch.no_grad()
def observe_inputs(
    model: PreTrainedModel, batches: Iterable[CalibrationBatch], layers: Iterable[str], observer: Observer
) -> int:
    """Run the model once over the batches and hand the inputs of the named layers to `observer`.

    The model is left as it was: the hooks are removed, and its training mode is put back.

    Args:
        model: a causal LM; the head is not evaluated.
        batches: the calibration data, read once, one batch in memory at a time.
        layers: full names of the layers to watch.
        observer: called for every layer and batch.

    Returns:
        The number of tokens seen, padding left out.

    Raises:
        SparqError: there are no tokens, an id is outside the vocabulary, a batch has the wrong shape or is
            longer than the model's context.
    """
    kept = torch.zeros(0, dtype=torch.bool)  # the current batch's mask; the hooks read it when they run

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # OPT flattens batch and length before its MLP, Llama does not.
            observer(name, inputs[0].flatten(0, -2)[kept])

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in layers]
    tokens = 0
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        model.eval()
        with progress("calibration", total=total, unit="batch") as bar:
            for index, batch in enumerate(batches):
                ids, mask = checked_batch(model, batch, index)
                kept = mask.flatten().bool()
                tokens += int(kept.sum())
                if kept.any():
                    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                bar.update()
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if tokens == 0:
        raise SparqError("the calibration data has no tokens; give at least one batch, 512 tokens or more are advised")
    return tokens


def input_absmax(
    model: PreTrainedModel, batches: Iterable[CalibrationBatch], layers: Iterable[str]
) -> dict[str, Float[Tensor, " _"]]:
    """Return max |x| of each input channel of the named layers over the calibration tokens, in float32.

    Args:
        model: a causal LM, left as it was.
        batches: the calibration data, read once.
        layers: full names of the layers.

    Raises:
        SparqError: as `observe_inputs`, or an input is NaN or infinite.
    """
    largest: dict[str, Tensor] = {}

    def update(name: str, rows: Tensor) -> None:
        absmax = rows.float().abs().amax(0)
        if not absmax.isfinite().all():
            raise SparqError(f"the inputs of {name} are NaN or infinite on the calibration data; check the model")
        largest[name] = torch.maximum(largest[name], absmax) if name in largest else absmax

    observe_inputs(model, batches, layers, update)
    return largest


def checked_batch(
    model: PreTrainedModel, batch: CalibrationBatch, index: int
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Return token ids and mask of a calibration batch on the model's device, or say what is wrong with it."""
    where = f"calibration batch {index}"
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise SparqError(f"{where} has no 'input_ids', only {sorted(batch)}")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    else:
        ids, mask = batch, None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise SparqError(f"{where} is {found}; it must be integer token ids of shape [batch, length]")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise SparqError(f"{where} has a mask of shape {list(mask.shape)} for ids of shape {list(ids.shape)}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.numel():
        raise SparqError(
            f"{where} has the token id {int(outside[0])}, but the model's vocabulary has {vocabulary} "
            "tokens (0 up to one less): it was made with another tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and ids.shape[1] > context:
        raise SparqError(f"{where} has {ids.shape[1]} tokens a row, but the model's context is {context}: cut it")
    return ids.to(model.device), mask.to(model.device)
