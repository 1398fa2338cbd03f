"""Where B A starts, and what a start takes out of the base.

    kaiming    A uniform, B = 0 (Hu et al. 2021)
    pissa      s B A = the largest singular parts of W (Meng et al. 2024, arXiv 2404.02948)
    olora      B, A = the first columns of Q and rows of R in W = Q R (Büyükakyüz 2024, arXiv 2406.01775)
    eva        A = the first principal directions of the inputs, B = 0 (Paischer et al. 2024, arXiv 2410.07170)
    loftq      s B A = the largest singular parts of what rounding left of W (`sparq.adaptation.loftq`)

`pissa` and `olora` leave the model as it was by taking s B A out of the base: W - s B A + s B A. The files must not
depend on such a base, which would have to be computed again to the last bit. So what was taken out is kept beside the
adapters, R = R_b R_a, and becomes part of them when they are saved: W - R + s B A = W + s [B, -R_b / s] [A; R_a].
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sparq.adaptation.loftq import LoftQ
from sparq.adaptation.quantized_base import LowRank
from sparq.adaptation.settings import LoraSettings
from sparq.data import IGNORE, Batch
from sparq.errors import SparqError

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers with adapters, by their name in the model that was adapted."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def removed_parts(model: PeftModel) -> dict[str, LowRank]:
    """Return what was taken out of the base of each layer, if anything was."""
    return {
        name: LowRank(a=layer.removed_a, b=layer.removed_b)
        for name, layer in adapted_layers(model)
        if hasattr(layer, "removed_a")
    }


def _remember(layer: nn.Module, removed: LowRank) -> None:
    # Buffers move with the layer; they are not part of its state, which is PEFT's.
    layer.register_buffer("removed_a", removed.a.detach().clone(), persistent=False)
    layer.register_buffer("removed_b", removed.b.detach().clone(), persistent=False)


@torch.no_grad()
def remember_start(model: PeftModel, settings: LoraSettings) -> None:
    """Keep what PEFT took out of a float base: what the adapters amount to before the first update."""
    for _, layer in adapted_layers(model):
        b = settings.scaling * layer.lora_B[ADAPTER].weight
        _remember(layer, LowRank(a=layer.lora_A[ADAPTER].weight, b=b))


@torch.no_grad()
def start_from_loftq(model: PeftModel, starts: Mapping[str, LoftQ], settings: LoraSettings) -> None:
    """Put LoftQ's adapters in; the base must be quantized with their `removed` parts already."""
    for name, layer in adapted_layers(model):
        start = starts[name]
        layer.lora_A[ADAPTER].weight.copy_(start.added.a)
        layer.lora_B[ADAPTER].weight.copy_(start.added.b / settings.scaling)
        if start.removed is not None:
            _remember(layer, start.removed)
        if settings.dora:
            # Its lengths are those of the base and its adapters, which PEFT took before these were here.
            layer.lora_magnitude_vector[ADAPTER].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[ADAPTER].weight,
                lora_B=layer.lora_B[ADAPTER].weight,
                scaling=settings.scaling,
            )


def start_from_inputs(model: PeftModel, batches: Sequence[Batch], settings: LoraSettings) -> None:
    """EVA: let A span the directions in which the layers' inputs vary most, at the positions that are trained on.

    Args:
        model: with adapters.
        batches: training batches, read again and again until the directions settle; those with fewer target tokens
            than the rank, such as the last of an epoch, cannot be decomposed and are left out.
        settings: with `eva`.

    Raises:
        SparqError: no batch has as many target tokens as the rank.
    """
    inputs = [batch for batch in batches if batch.num_targets >= settings.rank]
    if not inputs:
        targets = [batch.num_targets for batch in batches]
        raise SparqError(
            f"LoRA initialization 'eva' needs training batches of as many target tokens as the rank, {settings.rank};"
            f" the largest of {len(batches)} has {max(targets, default=0)}: give larger ones, or lower the rank"
        )
    initialize_lora_eva_weights(
        model,
        inputs,
        forward_fn=lambda model, batch: model(**batch.model_inputs(), use_cache=False),
        prepare_model_inputs_fn=lambda batch, _: (batch.labels != IGNORE).flatten(),
        # PEFT's own would not do for OPT, whose MLP sees tokens in one dimension.
        prepare_layer_inputs_fn=lambda hidden, counts, _: hidden[0].flatten(0, -2)[counts],
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def absorb_removed(tensors: Mapping[str, Tensor], removed: Mapping[str, LowRank], scaling: float) -> dict[str, Tensor]:
    """Return adapters of the original base: those of a changed base, less what was taken out of it.

    Args:
        tensors: PEFT's tensors of one adapter, by the names of its file.
        removed: by name of a layer, what was taken out; its rank is the adapters'.
        scaling: s, which stays the same.
    """
    result = dict(tensors)
    for name, part in removed.items():
        a, b = (f"base_model.model.{name}.lora_{letter}.weight" for letter in "AB")
        result[a] = torch.cat((tensors[a].float(), part.a.cpu()))
        result[b] = torch.cat((tensors[b].float(), -part.b.cpu() / scaling), dim=1)
    return result
