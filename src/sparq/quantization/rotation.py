"""Rotation: another basis for the residual stream, for the values of each head and for the MLP's last input.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456). An RMSNorm without weights commutes with an orthogonal matrix R, so
that R can be multiplied into every weight that reads from the residual stream, and its transpose into every one that
writes to it, without a change of the output. An outlier of one channel is then spread over all. Likewise for the
heads' values, which the attention only adds up, whatever its rows sum to, and, at run time, for the input of the
MLP's last layer.

What a norm has beyond that is moved first: its weights, and a LayerNorm's bias, into the layers that read it. A
LayerNorm also subtracts the mean, which is the component along one direction of the rotated stream. A norm behind its
sublayer (OPT-350m) scales the residual stream itself, so there the stream stays as it is.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.attention import CHILD
from sparq.errors import SparqError
from sparq.models.families import attention_layers, decoder_blocks, family_of, is_pre_norm
from sparq.quantization.hadamard import random_rotation


class PlainNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) on a rotated residual stream, a LayerNorm's after taking out what was the mean.

    Attributes:
        direction: unit vector [hidden], the rotated direction of equal channels; None for an RMSNorm.
    """

    direction: Tensor | None

    def __init__(self, hidden: int, eps: float, *, subtracts_mean: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps, elementwise_affine=False)
        self.register_buffer("direction", torch.zeros(hidden) if subtracts_mean else None)

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Return the normalized states."""
        if self.direction is not None:
            x = x - (x @ self.direction).unsqueeze(-1) * self.direction
        result: Tensor = self.norm(x)
        return result


class RotatedNorm(PlainNorm):
    """The norm before the head, with its old weights and bias, in the basis of the head, which may so stay tied.

    Attributes:
        basis: from rotated and plainly normalized states to what the head reads.
    """

    def __init__(self, hidden: int, eps: float, *, subtracts_mean: bool) -> None:
        super().__init__(hidden, eps, subtracts_mean=subtracts_mean)
        self.basis = nn.Linear(hidden, hidden, bias=subtracts_mean)

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Return the normalized states as the head reads them."""
        result: Tensor = self.basis(super().forward(x))
        return result


def replace_norms(model: PreTrainedModel) -> None:
    """Give a model the norms of a rotated one, of the same shapes and whatever weights; none in a post-norm model."""
    if not is_pre_norm(model):
        return
    family = family_of(model)
    final = _part(model, family.final_norm)
    for layer in attention_layers(model):
        converted = getattr(layer, CHILD, None)
        if converted is not None and converted.gate is not None:
            converted.basis = nn.Linear(len(final.weight), len(final.weight)).to(final.weight)
    for block in decoder_blocks(model):
        for group in family.norm_groups:
            block.set_submodule(group.norm, _replacement(PlainNorm, _part(block, group.norm)))
    model.set_submodule(family.final_norm, _replacement(RotatedNorm, final))


def _replacement(kind: type[PlainNorm], old: Any) -> PlainNorm:
    eps = old.eps if isinstance(old, nn.LayerNorm) else old.variance_epsilon
    return kind(len(old.weight), eps, subtracts_mean=isinstance(old, nn.LayerNorm)).to(old.weight)


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int) -> None:
    """Rotate a model's residual stream and values, in place; its output stays the same, rounding apart.

    The input of the MLP's last layer is left to a Hadamard matrix at run time (`QuantizedLinear.hadamard`).

    Args:
        model: a causal LM of `nn.Linear` layers.
        seed: of the random signs.
    """
    generator = torch.Generator().manual_seed(seed)
    _rotate_values(model, generator)
    if not is_pre_norm(model):
        return
    family = family_of(model)
    final = _part(model, family.final_norm)
    hidden = len(final.weight)
    for path in family.embeddings:
        if (width := _part(model, path).weight.shape[1]) != hidden:
            raise SparqError(
                f"{path} is {width} wide and the model {hidden}: rotation does not go through a projection before norms"
            )
    rotation = random_rotation(hidden, generator).to(final.weight.device)
    norms = [{group.norm: _part(block, group.norm) for group in family.norm_groups} for block in decoder_blocks(model)]
    replace_norms(model)
    for module in model.modules():
        if isinstance(module, PlainNorm) and module.direction is not None:
            _set(module.direction, rotation.sum(0) / hidden**0.5)
    head = model.get_output_embeddings().weight
    tied = any(_part(model, path).weight is head for path in family.embeddings)
    for path in family.embeddings:
        table = _part(model, path).weight
        _set(table, table.double() @ rotation)
    for block, own in zip(decoder_blocks(model), norms, strict=True):
        for group in family.norm_groups:
            for name in group.linears:
                _read_through(_part(block, name), own[group.norm], rotation)
        converted = getattr(_part(block, family.attention), CHILD, None)
        if converted is not None and converted.gate is not None:
            group = next(group for group in family.norm_groups if family.value in group.linears)
            _restore(converted.basis, own[group.norm], rotation)
        for name in (family.output, family.down):
            linear = _part(block, name)
            _set(linear.weight, rotation.T @ linear.weight.double())
            if linear.bias is not None:
                _set(linear.bias, linear.bias.double() @ rotation)
    _restore(_part(model, family.final_norm).basis, final, rotation, back=tied)


def _rotate_values(model: PreTrainedModel, generator: torch.Generator) -> None:
    family = family_of(model)
    for block in decoder_blocks(model):
        attention = _part(block, family.attention)
        converted = getattr(attention, CHILD, None)
        if converted is not None and converted.spec.gate is not None and converted.spec.gate.form == "elementwise":
            continue  # a gate of its own for each channel does not commute
        head_dim = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
        value, output = _part(block, family.value), _part(block, family.output)
        rotation = random_rotation(head_dim, generator).to(value.weight.device)
        for tensor in (value.weight, value.bias):
            if tensor is None:
                continue
            # [heads (3 if fused) head_dim columns]
            rows = tensor.double().view(-1, 3 if family.fused else 1, head_dim, tensor[0].numel())
            rows = torch.cat([rows[:, :-1], torch.einsum("hpdc,de->hpec", rows[:, -1:], rotation)], dim=1)
            _set(tensor, rows.reshape(tensor.shape))
        columns = output.weight.double().view(len(output.weight), -1, head_dim) @ rotation
        _set(output.weight, columns.flatten(1))


def _read_through(linear: Any, norm: Any, rotation: Float[Tensor, "hidden hidden"]) -> None:
    """Let a layer read the rotated, plainly normalized stream: what the norm did is multiplied into its weights."""
    weight = linear.weight.double()
    bias = getattr(norm, "bias", None)
    if bias is not None:
        moved = weight @ bias.double()
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
        _set(linear.bias, linear.bias.double() + moved)
    _set(linear.weight, (weight * norm.weight.double()) @ rotation)


def _restore(basis: nn.Linear, norm: Any, rotation: Float[Tensor, "hidden hidden"], *, back: bool = False) -> None:
    """Make a matrix give what the norm gave, `back` in the rotated basis, from the rotated and plainly normalized."""
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(norm.weight) if bias is None else bias
    weight = norm.weight.double()[:, None] * rotation
    _set(basis.weight, rotation.T @ weight if back else weight)
    if basis.bias is not None:
        _set(basis.bias, bias.double() @ rotation if back else bias)


def _part(module: nn.Module, path: str) -> Any:
    """Return a submodule; what it is, its family says and no type."""
    return module.get_submodule(path)


def _set(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value.to(tensor.dtype))
