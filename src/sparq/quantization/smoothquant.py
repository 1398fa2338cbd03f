"""SmoothQuant: move the outliers of activations into the weights, exactly, before either is quantized.

Xiao et al. 2023, arXiv 2211.10438, section 4. For any positive s, X W^T = (X diag(s)^-1) (W diag(s))^T. The
division is folded into the norm that makes X, and the multiplication into the weights of every linear layer
that reads it.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.attention import CHILD
from sparq.models.families import decoder_blocks, family_of, is_pre_norm

FLOOR = 1e-5
"""The smallest weight maximum and the smallest factor, as in the authors' code."""


def smoothing_factors(
    activation_absmax: Float[Tensor, " channels"],
    weights: Sequence[Float[Tensor, "_ channels"]],
    alpha: float,
) -> Float[Tensor, " channels"]:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), in float32 (equation 4).

    Args:
        activation_absmax: the largest magnitude of each channel over the calibration tokens.
        weights: [outputs, channels] of every layer that reads these activations; their common maximum counts.
        alpha: migration strength, 0 to 1.
    """
    weight_absmax = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0).clamp(min=FLOOR)
    return (activation_absmax.float() ** alpha / weight_absmax ** (1 - alpha)).clamp(min=FLOOR)


def smoothed_groups(model: PreTrainedModel) -> Iterator[tuple[nn.Module | None, tuple[str, ...]]]:
    """Yield, for every group of layers with a common input, the norm to fold into and the layers' full names.

    These are q, k, v and the first linear layers of the MLP. The output projection of the attention and the
    last layer of the MLP have no norm before them and are not smoothed. The norm is None where nothing can be
    folded: in post-norm models the norm's output also feeds the residual connection, gates read it too, and a norm
    may have no weights.
    """
    family = family_of(model)
    for index, block in enumerate(decoder_blocks(model)):
        for group in family.norm_groups:
            norm = block.get_submodule(group.norm)
            attention = getattr(block.get_submodule(family.attention), CHILD, None)
            # Gates read what q, k and v read, and are not smoothed.
            gated = family.value in group.linears and attention is not None and attention.gate is not None
            foldable = is_pre_norm(model) and norm.weight is not None and not gated
            names = tuple(f"{family.blocks}.{index}.{name}" for name in group.linears)
            yield (norm if foldable else None), names


def model_smoothing_factors(
    model: PreTrainedModel, activation_absmax: Mapping[str, Float[Tensor, " _"]], alpha: float
) -> dict[str, Float[Tensor, " _"]]:
    """Return the factors of every smoothed linear layer, by its full name; equal within a group.

    Args:
        model: a causal LM with `nn.Linear` layers.
        activation_absmax: `observers.input_absmax` of the first layer of each group.
        alpha: migration strength, 0 to 1.
    """
    factors: dict[str, Tensor] = {}
    for _, names in smoothed_groups(model):
        weights = [model.get_submodule(name).weight.detach() for name in names]
        factors.update(dict.fromkeys(names, smoothing_factors(activation_absmax[names[0]], weights, alpha)))
    return factors


@torch.no_grad()
def fold_into_norms(model: PreTrainedModel, factors: Mapping[str, Float[Tensor, " _"]]) -> set[str]:
    """Divide the weight, and the bias of a LayerNorm, of every norm that can take it, in place.

    Returns:
        The names of the layers whose input the norm does not divide, so that they must do it themselves.
    """
    left: set[str] = set()
    for norm, names in smoothed_groups(model):
        if norm is None:
            left.update(names)
            continue
        factor = factors[names[0]]
        for tensor in (norm.weight, getattr(norm, "bias", None)):
            if tensor is not None:
                assert isinstance(tensor, Tensor)
                tensor.copy_(tensor.float() / factor)
    return left
