"""Attention with a sink through PyTorch's own fused kernels, forward and backward, in linear memory.

Such a kernel returns O = softmax(s) v and lse = log(sum(exp(s))) of every row. A sink is one more key of value 0 and
logit b, so all that it changes is the denominator:

    O' = O * sigmoid(lse - b)        lse' = logaddexp(lse, b)

The kernel's backward recomputes P = exp(s - lse) and needs delta = rowsum(dO * O). Given O' and lse' it therefore
returns the exact gradient of the attention with the sink; the sink's own is dL/db = -exp(b - lse') * delta. `softmax1`
is b = 0. For `max_shift` b is the maximum of the row: its gradient goes on to the query and to the key that the maximum
comes from.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparq.attention.fused_cpu import CPU
from sparq.attention.fused_cuda import cuda_kernel, takes_triton
from sparq.attention.fused_kernel import Bias, FusedKernel, Keys, Queries, Rows
from sparq.attention.reference import Mask, may_see
from sparq.attention.row_max import row_max

_BLOCK_ROWS = 1024
"""Rows of a block: a quarter of a megabyte in float32, and so few blocks that their number costs nothing."""

_DEVICE_BLOCK_ROWS = 1 << 18
"""The same elsewhere, where every block costs launches: 64 megabytes."""


def fused_kernel(query: Queries, *, masked: bool) -> FusedKernel | None:
    """Return the kernel for these queries, or None if their device has none for their type and width.

    If there is one with a mask, there is one without.
    """
    if query.device.type == "cpu":
        return CPU
    return cuda_kernel(query, masked=masked) if query.device.type == "cuda" else None


def flash_sink_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Mask | None,
    sink: Float[Tensor, " heads"] | None,
    *,
    is_causal: bool,
    scaling: float,
    kernel: FusedKernel | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Compute `softmax1` attention, or `learned_sink` if logits are given; `fused_kernel` must have a kernel for it.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        mask: what a query may see, as booleans or as numbers to add to the scores; no gradient flows into it.
        sink: logit of the sink of each head; None is 0.
        is_causal: query i sees the keys 0 to i, of which there are as many.
        scaling: factor on the query-key products.
        kernel: the one to use, of keys with fewer heads than queries if need be; None is the device's for the type.
    """
    if kernel is None:
        kernel, key, value = _kernel(query, key, value, mask)
    bias = None if mask is None else as_bias(mask, query.dtype)
    logit = None if sink is None else sink.view(-1, 1)
    out: Tensor = _SinkAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, bias, logit, kernel, is_causal, scaling
    )
    return out


def flash_max_shift_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Mask | None,
    *,
    is_causal: bool,
    scaling: float,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Compute `max_shift` attention, by a kernel of its own on CUDA; arguments as in `flash_sink_attention`."""
    if takes_triton(query):
        from sparq.attention.triton_max_shift import triton_max_shift_attention

        mask = mask if mask is None or mask.dtype == torch.bool else as_bias(mask, query.dtype)
        return triton_max_shift_attention(query, key, value, mask, is_causal=is_causal, scaling=scaling)
    kernel, key, value = _kernel(query, key, value, mask)
    bias = None if mask is None else as_bias(mask, query.dtype)
    out: Tensor = _MaxShiftAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, bias, kernel, is_causal, scaling
    )
    return out


def as_bias(mask: Mask, dtype: torch.dtype) -> Bias:
    """Return numbers to add to the scores, -inf where a query may not see a key."""
    allowed = mask if mask.dtype == torch.bool else may_see(mask)
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if mask.dtype == torch.bool else mask.to(dtype)
    return bias.masked_fill(~allowed, float("-inf"))


def _kernel(query: Queries, key: Keys, value: Keys, mask: Tensor | None) -> tuple[FusedKernel, Keys, Keys]:
    """Return the kernel, and keys and values of as many heads as it wants."""
    kernel = fused_kernel(query, masked=mask is not None)
    assert kernel is not None, f"no fused kernel for {query.dtype} on {query.device}"
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not kernel.has_groups:
        # Autograd adds the gradients up again.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return kernel, key, value


def _scale(out: Tensor, lse: Rows, logit: Tensor) -> None:
    """Multiply by sigmoid(lse - b), in place and in the type of the output: another type would cost a copy of it."""
    logit = logit.expand_as(lse)
    for rows in _blocks(out):
        excess = lse[:, :, rows] - logit[:, :, rows]
        out[:, :, rows].mul_(excess.sigmoid_().to(out.dtype).unsqueeze(-1))


def _blocks(out: Float[Tensor, "batch heads queries head_dim"]) -> Iterator[slice]:
    """Yield runs of queries of some `_BLOCK_ROWS` rows, so that what is computed of a run takes next to no memory."""
    block_rows = _BLOCK_ROWS if out.device.type == "cpu" else _DEVICE_BLOCK_ROWS
    size = max(1, block_rows // (out.shape[0] * out.shape[1]))
    for start in range(0, out.shape[2], size):
        yield slice(start, start + size)


def _delta(grad: Tensor, out: Tensor, lse: Rows) -> Rows:
    """Return rowsum(dO * O) in the type of the lse."""
    delta = torch.empty_like(lse)
    for rows in _blocks(out):
        torch.linalg.vecdot(grad[:, :, rows].to(lse.dtype), out[:, :, rows].to(lse.dtype), out=delta[:, :, rows])
    return delta


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None,
        kernel: FusedKernel, is_causal: bool, scaling: float,
    ) -> Tensor:  # fmt: skip
        out, lse, state = kernel.forward(query, key, value, bias, is_causal=is_causal, scaling=scaling)
        logit = torch.zeros((), dtype=lse.dtype, device=lse.device) if sink is None else sink.detach().to(lse.dtype)
        _scale(out, lse, logit)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, sink, out, torch.logaddexp(lse, logit, out=lse), *state)
            ctx.settings = kernel, is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink, out, lse, *state = ctx.saved_tensors
        kernel, is_causal, scaling = ctx.settings
        gradients = kernel.backward(
            grad, query, key, value, out, lse, tuple(state), is_causal=is_causal, scaling=scaling
        )
        grad_sink = None
        if sink is not None and ctx.needs_input_grad[4]:
            # [batch heads queries]
            grad_logit = -torch.exp(sink.to(lse.dtype) - lse) * _delta(grad, out, lse)
            grad_sink = grad_logit.sum(dim=0).sum_to_size(sink.shape).to(sink.dtype)
        return *gradients, None, grad_sink, None, None, None


class _MaxShiftAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
        kernel: FusedKernel, is_causal: bool, scaling: float,
    ) -> Tensor:  # fmt: skip
        out, lse, state = kernel.forward(query, key, value, bias, is_causal=is_causal, scaling=scaling)
        logit, argmax = row_max(query, key, bias, is_causal=is_causal, scaling=scaling)
        _scale(out, lse, logit)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, out, torch.logaddexp(lse, logit, out=lse), logit, argmax, *state)
            ctx.settings = kernel, is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, logit, argmax, *state = ctx.saved_tensors
        kernel, is_causal, scaling = ctx.settings
        grad_query, grad_key, grad_value = kernel.backward(
            grad, query, key, value, out, lse, tuple(state), is_causal=is_causal, scaling=scaling
        )
        # [batch heads queries]
        grad_score = -scaling * torch.exp(logit - lse) * _delta(grad, out, lse)
        _add_through_the_maximum(grad_query, grad_key, query, key, argmax, grad_score.to(query.dtype))
        return grad_query, grad_key, grad_value, None, None, None, None


def _add_through_the_maximum(
    grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor,
    argmax: Int[Tensor, "batch heads queries"], grad_score: Rows,
) -> None:  # fmt: skip
    """Add grad_score * key[argmax] to the queries' gradient and grad_score * query to that of key[argmax]."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    # Query heads of one key head one after another: [batch kv_heads groups*queries head_dim]
    index = argmax.reshape(batch, kv_heads, -1, 1).expand(-1, -1, -1, head_dim)
    picked = key.gather(2, index).view(batch, heads, queries, head_dim)
    grad_query.addcmul_(grad_score.unsqueeze(-1), picked)
    rows = (grad_score.unsqueeze(-1) * query).reshape(batch, kv_heads, -1, head_dim)
    grad_key.scatter_add_(2, index, rows.to(grad_key.dtype))
