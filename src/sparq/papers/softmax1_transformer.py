"""The transformer of SpARQ definition C.2: no causal mask, no residual stream, heads as wide as the stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparq.attention.probabilities import attention_probabilities

Matrix = Float[Tensor, "width width"]
Heads = Float[Tensor, "heads width width"]


@dataclass(frozen=True, kw_only=True)
class TheoremBlock:
    """One block.

    Attributes:
        query: W_Q of each head.
        key: W_K.
        value: W_V.
        output: W_O.
        first: W_1.
        first_bias: b_1.
        second: W_2.
        second_bias: b_2.
    """

    query: Heads
    key: Heads
    value: Heads
    output: Heads
    first: Matrix
    first_bias: Float[Tensor, " width"]
    second: Matrix
    second_bias: Float[Tensor, " width"]


@dataclass(frozen=True, kw_only=True)
class TheoremTransformer:
    """Blocks, the output layer W_o, and what Softmax_1 is in all of it: exact, or with equation 3.2's shift."""

    blocks: Sequence[TheoremBlock]
    head: Matrix
    normalization: Literal["softmax1", "max_shift"] = "softmax1"

    def __call__(self, x: Float[Tensor, "width tokens"]) -> Float[Tensor, "width tokens"]:
        """Return TF(X): a column of X is a token.

        With Z_0 = X, a block is A = sum over heads of W_O W_V Z Softmax_1(Z^T W_K^T W_Q Z), then
        Z' = W_2 ReLU(W_1 A + b_1) + b_2; the result is Softmax_1(W_o Z_L). Softmax_1 is that of columns. Definition
        C.2 prints W_K without its transpose; the proof has it.
        """
        z = x
        for block in self.blocks:
            scores = z.T @ block.key.mT @ block.query @ z  # heads, keys, queries
            mixed = block.output @ block.value @ z @ self._columns(scores)
            hidden = torch.relu(block.first @ mixed.sum(0) + block.first_bias[:, None])
            z = block.second @ hidden + block.second_bias[:, None]
        return self._columns(self.head @ z)

    def _columns(self, scores: Float[Tensor, "*heads rows columns"]) -> Float[Tensor, "*heads rows columns"]:
        return attention_probabilities(scores.mT, None, self.normalization).mT
