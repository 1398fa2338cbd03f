"""A frozen base in 8 or 4 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), and what it is in floating point.

    y = D(Q(W - R)) x + s B A x

Q rounds to the nearest, D returns to floating point at every use, and R is of low rank: 0, or what LoftQ took out.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.adaptation.settings import Base
from sparq.errors import SparqError
from sparq.models.families import named_linears
from sparq.progress import progress

if TYPE_CHECKING:
    from sparq.adaptation.frozen_linear import FrozenInt8, FrozenNF4


class LowRank(NamedTuple):
    """The matrix `b @ a`."""

    a: Float[Tensor, "rank inputs"]
    b: Float[Tensor, "outputs rank"]

    @property
    def product(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix itself."""
        return self.b @ self.a


def frozen(
    weight: Float[Tensor, "outputs inputs"], base: Base, bias: Float[Tensor, " outputs"] | None = None
) -> "FrozenInt8 | FrozenNF4":
    """Return a linear layer that keeps `weight` in few bits.

    Raises:
        SparqError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise SparqError(f"a base in {base} needs bitsandbytes: pip install 'sparq[qlora]'")
    from sparq.adaptation.frozen_linear import frozen_linear

    return frozen_linear(weight, bias, base)


@torch.no_grad()
def quantize_base(model: PreTrainedModel, base: Base, removed: Mapping[str, LowRank]) -> None:
    """Replace every linear layer of the blocks by a frozen one in few bits; embedding, head and norms stay.

    Args:
        model: the model, best in float32; its layers are let go one by one.
        base: what they are kept in.
        removed: by name of a layer, what is taken out of its weights ahead of rounding.

    Raises:
        SparqError: bitsandbytes is not installed.
    """
    linears = list(named_linears(model))
    with progress(f"quantize the base to {base}", total=len(linears), unit="layer") as bar:
        for name, linear in linears:
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, frozen(_remaining(linear, removed.get(name)), base, linear.bias))
            bar.update()


@torch.no_grad()
def round_base(model: PreTrainedModel, base: Base | None, removed: Mapping[str, LowRank]) -> None:
    """Give every linear layer of the blocks the weights that it has after `quantize_base`, in floating point."""
    for name, linear in named_linears(model):
        assert isinstance(linear, nn.Linear)
        weight = _remaining(linear, removed.get(name))
        linear.weight.copy_(weight if base is None else frozen(weight, base).dequantized())


def _remaining(linear: nn.Linear, removed: LowRank | None) -> Tensor:
    weight = linear.weight.detach().float()
    return weight if removed is None else weight - removed.product
