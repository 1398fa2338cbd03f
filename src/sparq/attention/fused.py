"""Attention with a sink through PyTorch's own flash kernel, forward and backward, in linear memory.

The kernel returns O = softmax(s) v and lse = log(sum(exp(s))) of every row. A sink is one more key of value 0 and logit
b, so all that it changes is the denominator:

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

from sparq.attention.row_max import row_max

_Rows = Float[Tensor, "batch heads queries"]

_BLOCK_ROWS = 1024
"""Rows of a block: a quarter of a megabyte in float32, and so few blocks that their number costs nothing."""


def flash_sink_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    bias: Float[Tensor, "#batch #heads #queries keys"] | None,
    sink: Float[Tensor, "heads 1"] | None,
    *,
    is_causal: bool,
    scaling: float,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Compute `softmax1` attention, or `learned_sink` if logits are given, on a CPU.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        bias: numbers to add to the scores, -inf where a query may not see a key; no gradient flows into it.
        sink: logit of the sink of each head; None is 0.
        is_causal: query i sees the keys 0 to i.
        scaling: factor on the query-key products.
    """
    out: Tensor = _SinkAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, bias, sink, is_causal, scaling
    )
    return out


def flash_max_shift_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    bias: Float[Tensor, "#batch #heads #queries keys"] | None,
    *,
    is_causal: bool,
    scaling: float,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Compute `max_shift` attention on a CPU; arguments as in `flash_sink_attention`."""
    out: Tensor = _MaxShiftAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, bias, is_causal, scaling
    )
    return out


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scaling: float
) -> tuple[Tensor, _Rows]:
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scaling
    )
    return result


def _scale(out: Tensor, lse: _Rows, logit: Tensor) -> None:
    """Multiply by sigmoid(lse - b), in place and in the type of the output: another type would cost a copy of it."""
    logit = logit.expand_as(lse)
    for rows in _blocks(out):
        excess = lse[:, :, rows] - logit[:, :, rows]
        out[:, :, rows].mul_(excess.sigmoid_().to(out.dtype).unsqueeze(-1))


def _blocks(out: Float[Tensor, "batch heads queries head_dim"]) -> Iterator[slice]:
    """Yield runs of queries of some `_BLOCK_ROWS` rows, so that what is computed of a run takes next to no memory."""
    size = max(1, _BLOCK_ROWS // (out.shape[0] * out.shape[1]))
    for start in range(0, out.shape[2], size):
        yield slice(start, start + size)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None,
    is_causal: bool, scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=bias, scale=scaling
    )
    return gradients


def _delta(grad: Tensor, out: Tensor, lse: _Rows) -> _Rows:
    """Return rowsum(dO * O) in the type of the lse."""
    delta = torch.empty_like(lse)
    for rows in _blocks(out):
        torch.linalg.vecdot(grad[:, :, rows].to(lse.dtype), out[:, :, rows].to(lse.dtype), out=delta[:, :, rows])
    return delta


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None,
        is_causal: bool, scaling: float,
    ) -> Tensor:  # fmt: skip
        out, lse = _flash(query, key, value, bias, is_causal, scaling)
        logit = torch.zeros((), dtype=lse.dtype) if sink is None else sink.detach().to(lse.dtype)
        _scale(out, lse, logit)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, bias, sink, out, torch.logaddexp(lse, logit, out=lse))
            ctx.settings = is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, out, lse = ctx.saved_tensors
        gradients = _flash_backward(grad, query, key, value, out, lse, bias, *ctx.settings)
        grad_sink = None
        if sink is not None and ctx.needs_input_grad[4]:
            # [batch heads queries]
            grad_logit = -torch.exp(sink.to(lse.dtype) - lse) * _delta(grad, out, lse)
            grad_sink = grad_logit.sum(dim=0).sum_to_size(sink.shape).to(sink.dtype)
        return *gradients, None, grad_sink, None, None


class _MaxShiftAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scaling: float
    ) -> Tensor:
        out, lse = _flash(query, key, value, bias, is_causal, scaling)
        logit, argmax = row_max(query, key, bias, is_causal=is_causal, scaling=scaling)
        _scale(out, lse, logit)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, bias, out, torch.logaddexp(lse, logit, out=lse), logit, argmax)
            ctx.settings = is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, lse, logit, argmax = ctx.saved_tensors
        is_causal, scaling = ctx.settings
        grad_query, grad_key, grad_value = _flash_backward(grad, query, key, value, out, lse, bias, is_causal, scaling)
        # [batch heads queries]
        grad_score = -scaling * torch.exp(logit - lse) * _delta(grad, out, lse)
        _add_through_the_maximum(grad_query, grad_key, query, key, argmax, grad_score.to(query.dtype))
        return grad_query, grad_key, grad_value, None, None, None


def _add_through_the_maximum(
    grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor,
    argmax: Int[Tensor, "batch heads queries"], grad_score: _Rows,
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
