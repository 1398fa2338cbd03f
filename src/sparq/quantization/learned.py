"""OmniQuant and AffineQuant: clipping and equivalent changes that are trained block by block.

Shao et al. 2023, arXiv 2308.13137; Ma et al. 2024, arXiv 2403.12544. For each block in turn, AdamW minimizes

    mean over calibration tokens of ||quantized block(x_q) - float block(x_f)||^2

where x_q comes from the quantized blocks before and x_f from the float ones. `omniquant` learns what share of a weight
row's range is covered (learnable weight clipping) and a diagonal change with a shift (learnable equivalent
transformation) behind both norms and between values and output projection; `affinequant` learns whole matrices there.
Behind norms whole matrices cost a product at run time, so with quantized activations they are diagonal, as in the
paper.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.attention import CHILD
from sparq.errors import SparqError
from sparq.models.families import decoder_blocks, family_of, is_pre_norm
from sparq.progress import progress
from sparq.quantization.block_stream import BlockStream
from sparq.quantization.equivalence import Change, Junction
from sparq.quantization.learned_block import LearnedBlock
from sparq.quantization.observers import CalibrationBatch
from sparq.quantization.resume import BlockStore
from sparq.quantization.scheme import FLOAT_BITS, QuantizationScheme
from sparq.quantization.smoothquant import smoothing_factors


def learn_blocks(
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    batches: Iterable[CalibrationBatch],
    store: BlockStore | None = None,
) -> None:
    """Quantize a model's blocks with learned clipping and changes, in place.

    A block whose loss turns NaN or infinite keeps the best state before that. The bar shows each block's loss before
    and after training.

    Args:
        model: a float causal LM in evaluation mode that shares no weights with one to be kept.
        scheme: bits, groups, epochs and rates.
        batches: calibration data, read once; a batch is a step.
        store: where what finished blocks have learned is kept; those that it has are not trained again.

    Raises:
        SparqError: as `BlockStream`, or the block's float output is NaN or infinite.
    """
    stream = BlockStream(model, batches)
    floating = stream.copy()
    family = family_of(model)
    with progress(f"quantize {scheme.name}", total=len(stream.blocks), unit="block") as bar:
        for index, block in enumerate(decoder_blocks(model)):
            changes = [_start(floating, index, junction, scheme) for junction in junctions(model, block, scheme)]
            floating.advance(index)
            targets = [batch.states for batch in floating.batches]
            if not all(target.isfinite().all() for target in targets):
                raise SparqError(f"block {index} puts out NaN or infinity on the calibration data; check the model")
            learned = LearnedBlock(block, family, scheme, changes)
            kept = None if store is None else store.load(index)
            if kept is None:
                before, after = _train(learned, stream, index, targets, scheme)
                bar.set_postfix(loss=f"{before:.3g} to {after:.3g}")
                if store is not None:
                    store.save(index, learned.state_dict())
            else:
                learned.load_state_dict(kept)
            learned.finish()
            stream.advance(index)
            bar.update()


def junctions(model: PreTrainedModel, block: nn.Module, scheme: QuantizationScheme) -> list[Junction]:
    """Return where a block can be changed: behind its norms, and between its values and output projection."""
    family = family_of(model)
    whole = scheme.method == "affinequant"
    attention = block.get_submodule(family.attention)
    converted = getattr(attention, CHILD, None)
    gate = None if converted is None else converted.spec.gate
    found = []
    for group in family.norm_groups:
        norm = block.get_submodule(group.norm)
        folds = is_pre_norm(model) and (gate is None or family.value not in group.linears)
        found.append(
            Junction(
                maker=group.norm,
                readers=group.linears,
                width=block.get_submodule(group.linears[0]).in_features,  # type: ignore[arg-type]
                folds=folds,
                shifts=folds and not whole and isinstance(norm, nn.LayerNorm),
                whole=whole and scheme.activation_bits == FLOAT_BITS,
            )
        )
    if family.fused or (gate is not None and gate.form == "elementwise"):
        return found
    value, output = block.get_submodule(family.value), block.get_submodule(family.output)
    assert isinstance(value, nn.Linear)
    assert isinstance(output, nn.Linear)
    head_dim: int = attention.head_dim  # type: ignore[assignment]
    sums_to_one = converted is None or converted.is_softmax
    found.append(
        Junction(
            maker=family.value,
            readers=(family.output,),
            width=value.out_features,
            heads=value.out_features // head_dim,
            repeats=output.in_features // value.out_features,
            shifts=sums_to_one and gate is None and not whole and value.bias is not None,
            whole=whole,
        )
    )
    return found


@torch.no_grad()
def _start(stream: BlockStream, index: int, junction: Junction, scheme: QuantizationScheme) -> Change:
    """Return a change that starts as SmoothQuant's, with the middle of each channel's range as shift."""
    block = stream.blocks[index]
    reader = block.get_submodule(junction.readers[0])
    lows, highs = [], []
    for batch in range(len(stream.batches)):
        x = stream.inputs(index, reader, batch).float()
        lows.append(x.amin(0))
        highs.append(x.amax(0))
    low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    # Query heads that read one value head have its change in common.
    low = _by_value_head(low, junction).amin(1).flatten()
    high = _by_value_head(high, junction).amax(1).flatten()
    shift = (low + high) / 2 if junction.shifts else torch.zeros_like(low)
    weights = [
        _by_value_head(block.get_submodule(name).weight.abs().amax(0), junction).amax(1).flatten()[None]  # type: ignore[operator]
        for name in junction.readers
    ]
    scale = smoothing_factors(torch.maximum(high - shift, shift - low), weights, scheme.smoothing_alpha)
    return Change(junction, scale, shift, stability=scheme.stability)


def _by_value_head(x: Float[Tensor, " inputs"], junction: Junction) -> Float[Tensor, "heads repeats size"]:
    return x.view(junction.heads, junction.repeats, -1)


def _train(
    learned: LearnedBlock,
    stream: BlockStream,
    index: int,
    targets: list[Float[Tensor, "batch length hidden"]],
    scheme: QuantizationScheme,
) -> tuple[float, float]:
    """Train a block's parameters; return its loss before and after, the latter that of the best state."""
    clipping = [*learned.low.parameters(), *learned.high.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(learned.changes.parameters()), "lr": scheme.change_rate},
            {"params": clipping, "lr": scheme.clipping_rate},
        ],
        weight_decay=0.0,
    )
    start = least = _evaluate(learned, stream, index, targets)
    best = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    for epoch in range(scheme.epochs):
        for change in learned.changes:
            change.admitted.fill_((epoch + 1) / scheme.epochs)  # type: ignore[operator]
        for number in range(len(targets)):
            with torch.enable_grad():
                loss = _loss(learned, stream, index, number, targets[number])
            if not loss.isfinite():
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        now = _evaluate(learned, stream, index, targets)
        if not math.isfinite(now):
            break
        if now < least:
            least = now
            best = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    learned.load_state_dict(best)
    return start, least


@torch.no_grad()
def _evaluate(learned: LearnedBlock, stream: BlockStream, index: int, targets: list[Tensor]) -> float:
    losses = [float(_loss(learned, stream, index, number, target)) for number, target in enumerate(targets)]
    return sum(losses) / len(losses)


def _loss(learned: LearnedBlock, stream: BlockStream, index: int, number: int, target: Tensor) -> Tensor:
    batch = stream.batches[number]
    args, kwargs = batch.calls[index]
    error: Tensor = learned(batch.states, args, kwargs) - target
    return error.float().flatten(0, -2)[batch.kept].square().mean()
