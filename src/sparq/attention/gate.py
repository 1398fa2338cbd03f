"""Gates on the outputs of heads (Bondarenko et al. 2023, section 4.2)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparq.attention.spec import Gate

_MLP_HIDDEN = 4


class HeadGate(nn.Module):
    """sigmoid(G(x)) for every head and token, from the input x of the attention layer.

    The weights of the last map start at 0 and its bias at logit(pi), so all gates start at pi, or at exactly 1 with
    `rescale`. `linear` and `mlp` give head h the h-th slice of x, as wide as hidden / heads.

    Args:
        gate: which form, and its start.
        hidden: width of x.
        heads: number of query heads.
        head_dim: width of a head's output.
        like: a tensor of the type and device of the weights.
    """

    def __init__(self, gate: Gate, *, hidden: int, heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.gate, self.heads, self.head_dim = gate, heads, head_dim
        self.sliced = gate.form in ("linear", "mlp")
        assert not self.sliced or hidden % heads == 0, "the input is cut into a slice for each head"
        width = hidden // heads if self.sliced else hidden
        outputs = {"linear": 1, "mlp": 1, "all_heads": heads, "elementwise": heads * head_dim}[gate.form]
        groups = heads if self.sliced else 1

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

        self.first = self.first_bias = None
        if gate.form == "mlp":
            self.first, self.first_bias = parameter(groups, width, _MLP_HIDDEN), parameter(groups, _MLP_HIDDEN)
            # A zero hidden layer in front of a zero map would never learn; the seed is that of the caller.
            nn.init.normal_(self.first, std=width**-0.5)
            width = _MLP_HIDDEN
        self.weight, self.bias = parameter(groups, width, outputs), parameter(groups, outputs)
        nn.init.constant_(self.bias, math.log(gate.pi / (1 - gate.pi)))

    def forward(self, hidden_states: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length heads _"]:
        """Return the gates: one number a head, or head_dim of them for `elementwise`."""
        batch, length, _ = hidden_states.shape
        # [batch length groups width]
        x = hidden_states.view(batch, length, self.weight.shape[0], -1)
        if self.first is not None and self.first_bias is not None:
            x = torch.relu(torch.einsum("blgw,gwo->blgo", x, self.first) + self.first_bias)
        logits = torch.einsum("blgw,gwo->blgo", x, self.weight) + self.bias
        gates = torch.sigmoid(logits).view(batch, length, self.heads, -1)
        return gates / self.gate.pi if self.gate.rescale else gates
