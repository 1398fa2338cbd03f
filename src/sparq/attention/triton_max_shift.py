"""`max_shift` attention by Triton kernels: the row's maximum costs no pass of its own, and memory is linear.

Let s be a row of scores, m = max(s), j its arg-max (the first of equals) and Z = sum(exp(s - m)). The sink is a key of
value 0 and logit m, so its exponential is 1 and

    O = sum(exp(s - m) v) / (1 + Z)        lse = m + log(1 + Z)

which one pass over the keys gives together with m and j. As a correction of softmax(s) v and its own log-sum-exp, this
is O' = O * sigmoid(lse - m), lse' = logaddexp(lse, m). With delta = rowsum(dO * O), P = exp(s - lse) and the sink's
probability p = exp(m - lse) = 1 / (1 + Z), the gradient of a score is

    dS = P * (dO v - delta)        and at the arg-max, through the sink's logit, also - p * delta

so that dQ = scale * dS K, dK = scale * dS^T Q and dV = P^T dO. One kernel computes dQ, going over the keys, another dK
and dV, going over the queries of every head that shares the keys; neither needs atomics, so results are the same each
time. m and log(1 + Z) are kept apart: exp(s - m - log(1 + Z)) is precise for scores of any size, exp(s - lse) is not.

A row that may see no key gives 0, with gradient 0. float32 is multiplied in float32, not in TF32; probabilities of 16
bit are rounded to it ahead of their products, and sums are float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparq.attention.reference import Mask
from sparq.attention.triton_kernels import (
    ADDITIVE_MASK,
    BOOLEAN_MASK,
    NO_MASK,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)


def triton_max_shift_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Mask | None,
    *,
    is_causal: bool,
    scaling: float,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Compute `max_shift` attention.

    Args:
        query: queries of every head, float32, bfloat16 or float16, heads at most 128 wide.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        mask: True where a query may see a key, or numbers to add to the scores, -inf where it may not; no gradient
            flows into it.
        is_causal: query i sees the keys 0 to i.
        scaling: factor on the query-key products.
    """
    out: Tensor = _TritonMaxShift.apply(  # type: ignore[no-untyped-call]
        query, key, value, mask, is_causal, scaling
    )
    return out


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What a program of a kernel holds at once.

    Attributes:
        rows: queries.
        columns: keys.
        warps: of 32 threads each.
    """

    rows: int
    columns: int
    warps: int

    def options(self) -> dict[str, int]:
        """Return the options of the launch."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "num_stages": 2}


# Chosen by the compiler (Triton 3.7.1), not by a clock: the largest of those tried for which next to nothing of a head
# of 128 is moved from registers to memory, within the 99 KB of shared memory of compute capability 8.6.
FORWARD = {2: Blocks(rows=128, columns=64, warps=8), 4: Blocks(rows=64, columns=32, warps=8)}
QUERY_GRADIENT = {2: Blocks(rows=64, columns=32, warps=4), 4: Blocks(rows=32, columns=32, warps=4)}
KEY_GRADIENT = {2: Blocks(rows=32, columns=64, warps=4), 4: Blocks(rows=32, columns=32, warps=8)}
"""By the bytes of an element."""


class _TritonMaxShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float
    ) -> Tensor:
        query, key, value = (_neighboring(x) for x in (query, key, value))
        batch, heads, queries, _ = query.shape
        out = torch.empty_like(query)
        row_max, log_total = query.new_empty(2, batch, heads, queries, dtype=torch.float32)
        argmax = query.new_empty(batch, heads, queries, dtype=torch.int32)
        settings, blocks = _settings(query, key, mask, is_causal, scaling), FORWARD[query.element_size()]
        seen, strides = _mask_argument(query, key, mask)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            forward_kernel[_grid(query, blocks.rows)](
                query, key, value, seen, out, row_max, log_total, argmax,
                _strides(query), _strides(key), _strides(value), strides, _strides(out),
                **settings, **blocks.options(),
            )  # fmt: skip
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, mask, out, row_max, log_total, argmax)
            ctx.is_causal, ctx.scaling = is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, row_max, log_total, argmax = ctx.saved_tensors
        grad = _neighboring(grad)
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        delta = torch.empty_like(row_max)
        settings = _settings(query, key, mask, ctx.is_causal, ctx.scaling)
        query_blocks, key_blocks = QUERY_GRADIENT[query.element_size()], KEY_GRADIENT[query.element_size()]
        seen, strides = _mask_argument(query, key, mask)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            query_gradient_kernel[_grid(query, query_blocks.rows)](
                query, key, value, seen, out, grad, row_max, log_total, argmax, delta, grad_query,
                _strides(query), _strides(key), _strides(value), strides, _strides(out), _strides(grad),
                _strides(grad_query), **settings, **query_blocks.options(),
            )  # fmt: skip
            key_gradient_kernel[_grid(key, key_blocks.columns)](
                query, key, value, seen, grad, row_max, log_total, argmax, delta, grad_key, grad_value,
                _strides(query), _strides(key), _strides(value), strides, _strides(grad), _strides(grad_key),
                _strides(grad_value), **settings, **key_blocks.options(),
            )  # fmt: skip
        return grad_query, grad_key, grad_value, None, None, None


def _neighboring(x: Tensor) -> Tensor:
    """Return the tensor with neighboring columns, which is what the kernels read."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _grid(x: Tensor, rows: int) -> tuple[int]:
    batch, heads, length, _ = x.shape
    return (batch * heads * triton.cdiv(length, rows),)


def _mask_argument(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """Return what the kernels get as the mask and its strides, 0 along what it is shared by."""
    if mask is None:
        return query, (0, 0, 0, 0)
    mask = mask.expand(*query.shape[:3], key.shape[2])
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, mask.stride()


def _settings(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scaling: float) -> dict[str, Any]:
    """Return the arguments that all kernels share."""
    _, heads, queries, head_dim = query.shape
    kind = NO_MASK if mask is None else BOOLEAN_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    return {
        "sizes": (heads, heads // key.shape[1], queries, key.shape[2]),
        "scale": scaling,
        "HEAD_DIM": head_dim,
        # Products of matrices are at least 16 wide.
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "IS_CAUSAL": is_causal,
        "MASK": kind.value,
    }
