"""What `sparq.attention.fused` needs of a device: one pair of PyTorch ops, forward and backward."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

Queries = Float[Tensor, "batch heads queries head_dim"]
Keys = Float[Tensor, "batch kv_heads keys head_dim"]
Bias = Float[Tensor, "#batch #heads #queries keys"]
"""Numbers to add to the scores, -inf where a query may not see a key."""
Rows = Float[Tensor, "batch heads queries"]
State = tuple[Tensor | None, ...]
"""What a forward keeps for its backward beside inputs, output and log-sum-exp; the bias, if any, is in it."""


class FusedKernel(Protocol):
    """Softmax attention in linear memory that tells the log-sum-exp of its rows, and takes another one in its backward.

    The backward must use the output and the log-sum-exp as they are given, P = exp(s - lse) and
    delta = rowsum(dO * O): this is what makes it the backward of attention with a sink too.
    """

    @property
    def has_groups(self) -> bool:
        """Whether keys may have fewer heads than queries; else the caller repeats them."""

    def forward(
        self, query: Queries, key: Keys, value: Keys, bias: Bias | None, *, is_causal: bool, scaling: float
    ) -> tuple[Queries, Rows, State]:
        """Return softmax(s) v, which the caller may overwrite, log(sum(exp(s))) and what the backward wants.

        A row that sees no key gets 0, and any log-sum-exp but NaN or inf. Causal queries are as many as the keys.
        """

    def backward(
        self, grad: Queries, query: Queries, key: Keys, value: Keys, out: Queries, lse: Rows, state: State, *,
        is_causal: bool, scaling: float,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """Return the gradients of query, key and value."""
