"""Attention of many short documents in one row, forward and backward, on a CPU.

There a product of two small matrices costs little and every pass over the scores costs much. So the scores of all
documents lie in one buffer, a row for each query and head, and are normalized together by PyTorch's own softmax; a sink
is one more column of them. The products are made document by document, into the buffer.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_ALIGNMENT = 16
"""Columns of which a row has a multiple."""

Sink = Float[Tensor, " heads"] | Literal["none", "maximum"]
"""Logits, or no sink at all, or that of `max_shift`, the row's maximum."""


def short_documents_attention(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    sink: Sink,
    lengths: Sequence[int],
    *,
    scaling: float,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Compute causal attention within each document; memory is tokens times the longest document.

    In 16 bit the scores and the probabilities are rounded to that, and normalized in float32.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        sink: what else a query may attend to.
        lengths: tokens of each document, one after another.
        scaling: factor on the query-key products.
    """
    logits = sink if isinstance(sink, Tensor) else None
    out: Tensor = _ShortDocuments.apply(  # type: ignore[no-untyped-call]
        query, key, value, logits, "logits" if isinstance(sink, Tensor) else sink, tuple(lengths), scaling
    )
    return out


def _slices(lengths: Sequence[int], groups: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the length of every document, its tokens, and its rows in the buffers: `groups` a token."""
    start = 0
    for length in lengths:
        end = start + length
        yield length, slice(start, end), slice(groups * start, groups * end)
        start = end


def _fold(x: Float[Tensor, "1 heads tokens head_dim"], kv_heads: int) -> Float[Tensor, "kv_heads rows head_dim"]:
    """Put the query heads of one key head beside each other: a row is a token and one of them."""
    _, heads, tokens, head_dim = x.shape
    grouped = x.view(kv_heads, heads // kv_heads, tokens, head_dim).transpose(1, 2)
    return grouped.reshape(kv_heads, -1, head_dim)


def _unfold(rows: Float[Tensor, "kv_heads rows head_dim"], heads: int) -> Float[Tensor, "1 heads tokens head_dim"]:
    kv_heads, _, head_dim = rows.shape
    grouped = rows.view(kv_heads, -1, heads // kv_heads, head_dim).transpose(1, 2)
    return grouped.reshape(1, heads, -1, head_dim)


class _ShortDocuments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, logits: Tensor | None, kind: str,
        lengths: tuple[int, ...], scaling: float,
    ) -> Tensor:  # fmt: skip
        kv_heads, tokens = key.shape[1], key.shape[2]
        groups = query.shape[1] // kv_heads
        rows, keys, values = _fold(query * scaling, kv_heads), key[0], value[0]
        longest = max(lengths)
        width = longest + 1 + -(longest + 1) % _ALIGNMENT
        scores = rows.new_empty(kv_heads, tokens * groups, width)
        for length, own, block in _slices(lengths, groups):
            torch.bmm(rows[:, block], keys[:, own].mT, out=scores[:, block, :length])
        # What was not written is not seen either: a query sees the keys up to its own position.
        positions = torch.cat([torch.arange(length) for length in lengths]).repeat_interleave(groups)
        scores.masked_fill_(torch.arange(width) > positions[:, None], float("-inf"))
        argmax = None
        if kind == "maximum":
            largest, argmax = scores.max(dim=-1, keepdim=True)
            scores[..., -1:] = largest
        elif logits is not None:
            scores[..., -1] = logits.view(kv_heads, 1, groups).expand(-1, tokens, -1).reshape(kv_heads, -1)
        probabilities = torch.softmax(scores, dim=-1)
        out = torch.empty_like(rows)
        for length, own, block in _slices(lengths, groups):
            torch.bmm(probabilities[:, block, :length], values[:, own], out=out[:, block])
        ctx.save_for_backward(rows, key, value, logits, argmax, probabilities)
        ctx.settings = query.shape[1], lengths, scaling
        return _unfold(out, query.shape[1]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, key, value, logits, argmax, probabilities = ctx.saved_tensors
        heads, lengths, scaling = ctx.settings
        kv_heads, groups = key.shape[1], heads // key.shape[1]
        keys, values = key[0], value[0]
        grad_rows = _fold(grad.transpose(1, 2), kv_heads)
        grad_key, grad_value = (torch.empty_like(keys, memory_format=torch.contiguous_format) for _ in range(2))
        grad_query = torch.empty_like(rows)
        # Zero where nothing was seen, as the probabilities are: 0 times what memory happens to hold may be NaN.
        grad_scores = torch.zeros_like(probabilities)
        for length, own, block in _slices(lengths, groups):
            torch.bmm(grad_rows[:, block], values[:, own].mT, out=grad_scores[:, block, :length])
            torch.bmm(probabilities[:, block, :length].mT, grad_rows[:, block], out=grad_value[:, own])
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
        if argmax is not None:
            grad_scores.scatter_add_(2, argmax, grad_scores[..., -1:].clone())
        for length, own, block in _slices(lengths, groups):
            torch.bmm(grad_scores[:, block, :length], keys[:, own], out=grad_query[:, block])
            torch.bmm(grad_scores[:, block, :length].mT, rows[:, block], out=grad_key[:, own])
        grad_logits = None
        if logits is not None and ctx.needs_input_grad[3]:
            column = grad_scores[..., -1].to(logits.dtype).view(kv_heads, -1, groups)
            grad_logits = column.sum(dim=1).view(heads)
        grad_query = _unfold(grad_query, heads).mul_(scaling)
        return grad_query, grad_key[None], grad_value[None], grad_logits, None, None, None
