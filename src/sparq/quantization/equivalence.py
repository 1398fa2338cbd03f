"""Learnable changes of a block that leave its output in floating point as it is.

Between what makes a vector y and what reads it, y W^T + b, an invertible A and a shift d can be put:

    y' = (y - d) A^-1        W' = W A^T        b' = b + W d

OmniQuant (Shao et al. 2023, arXiv 2308.13137, section 3.3) learns a diagonal A and d; AffineQuant (Ma et al. 2024,
arXiv 2403.12544) a whole A, let in band by band so that it stays invertible. Here y is the output of a norm, or the
heads' values. The values' shift is exact only where rows of the attention sum to 1, so other attentions have none. A
whole A behind a norm costs a product at run time; the values' is multiplied into the value projection.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Junction:
    """A place for a change: who makes the vector, who reads it.

    Attributes:
        maker: name, from the block, of the norm or the value projection.
        readers: names of the linear layers that read the vector and nothing else.
        width: channels of y.
        heads: for values, heads that have a matrix of their own, else 1.
        repeats: query heads that read one value head.
        folds: whether the maker takes the change over; else the readers' input is divided by a diagonal A at run time.
        shifts: whether there is a d.
        whole: whether A is a whole matrix (for values, one a head), else diagonal.
    """

    maker: str
    readers: tuple[str, ...]
    width: int
    heads: int = 1
    repeats: int = 1
    folds: bool = True
    shifts: bool = False
    whole: bool = False


class Change(nn.Module):
    """The learnable A and d of one junction.

    Attributes:
        admitted: [], share of the off-diagonals that the gradual mask lets in, 0 to 1.

    Args:
        junction: where.
        scale: start of A's diagonal, positive.
        shift: start of d; not used where there is none.
        stability: what the gradual mask multiplies the off-diagonal elements by (AffineQuant's stability factor).
    """

    admitted: Tensor

    def __init__(
        self, junction: Junction, scale: Float[Tensor, " width"], shift: Float[Tensor, " width"], *, stability: float
    ) -> None:
        super().__init__()
        self.junction, self.stability = junction, stability
        self.log_scale = nn.Parameter(scale.float().log())
        self.shift = nn.Parameter(shift.float().clone()) if junction.shifts else None
        size = junction.width // junction.heads
        self.mix = nn.Parameter(self.log_scale.new_zeros(junction.heads, size, size)) if junction.whole else None
        self.register_buffer("admitted", self.log_scale.new_zeros(()))

    def scale(self) -> Float[Tensor, " width"]:
        """Return the diagonal of A."""
        return self.log_scale.exp()

    def matrix(self) -> Float[Tensor, "heads size size"]:
        """Return A = (I + stability M) diag(scale), where M is the learned mix within the band that is let in.

        AffineQuant's code has stability M + diag(scale). Here M mixes channels that the scale has balanced, so that one
        learning rate suits large and small channels.
        """
        heads, size = self.junction.heads, self.junction.width // self.junction.heads
        scale = self.scale().view(heads, size)
        if self.mix is None:
            return torch.diag_embed(scale)
        index = torch.arange(size, device=scale.device)
        distance = (index[:, None] - index).abs()
        band = ((distance > 0) & (distance <= self.admitted * size)).to(self.mix.dtype)
        return torch.diag_embed(scale) + self.stability * self.mix * band * scale[:, None]

    def change_reader(self, weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """Return W' = W A^T."""
        if self.mix is None:
            return weight * self._spread(self.scale())
        matrix = self.matrix().repeat_interleave(self.junction.repeats, dim=0)
        blocks = weight.view(len(weight), len(matrix), -1)
        return torch.einsum("ohi,hji->ohj", blocks, matrix).reshape(weight.shape)

    def moved(self, weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " outputs"] | None:
        """Return W d, which is added to the readers' bias."""
        return None if self.shift is None else weight @ self._spread(self.shift)

    def change_value(self, weight: Float[Tensor, "values inputs"]) -> Float[Tensor, "values inputs"]:
        """Return the weights that make y A^-1: A^-T times those that make y, head by head."""
        if self.mix is None:
            return weight / self.scale()[:, None]
        inverse = torch.linalg.inv(self.matrix().double()).to(weight.dtype)
        rows = weight.view(len(inverse), -1, weight.shape[1])
        return torch.einsum("hij,hic->hjc", inverse, rows).reshape(weight.shape)

    def change_offset(self, bias: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """Return (bias - d) A^-1: what a norm or a value projection adds."""
        shifted = bias if self.shift is None else bias - self.shift
        if self.mix is None:
            return shifted / self.scale()
        inverse = torch.linalg.inv(self.matrix().double()).to(bias.dtype)
        return torch.einsum("hi,hij->hj", shifted.view(len(inverse), -1), inverse).reshape(-1)

    def _spread(self, of_values: Float[Tensor, " width"]) -> Float[Tensor, " inputs"]:
        """Return a vector of the value heads for the query heads that read them."""
        if self.junction.repeats == 1:
            return of_values
        return of_values.view(self.junction.heads, -1).repeat_interleave(self.junction.repeats, 0).flatten()
