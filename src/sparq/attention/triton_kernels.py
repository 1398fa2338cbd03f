"""The Triton kernels of `max_shift`; `sparq.attention.triton_max_shift` has the equations and calls them.

Scores are in base 2, s * log2(e), because exp2 is what the hardware has. A program works on a block of rows of one
head. Matrices are [rows, HEAD_DIM] with neighboring columns, held as [rows, WIDTH], WIDTH being a power of 2. Strides
are tuples: batch, head, row; those of a mask: batch, head, query, key. Sizes are heads, groups (query heads of a key
head), queries, keys. What Triton must know when it compiles is in capitals.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))

NO_MASK = tl.constexpr(0)
BOOLEAN_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


@triton.jit
def _head(base, strides, batch, head):
    """Point to a head; tensors may be larger than 32-bit offsets reach."""
    return base + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def _pointers(base, strides, start, offsets, WIDTH: tl.constexpr):
    """Point to the rows start + offsets of a matrix."""
    columns = tl.arange(0, WIDTH)
    return base + tl.cast(start, tl.int64) * strides[2] + offsets[:, None] * strides[2] + columns[None, :]


@triton.jit
def _inside(start, offsets, end, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Tell which elements of the rows start + offsets exist: those before row `end`, and of the head's width."""
    return (start + offsets < end)[:, None] & (tl.arange(0, WIDTH) < HEAD_DIM)[None, :]


@triton.jit
def _load(base, strides, start, offsets, end, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Load the rows start + offsets of a matrix, 0 where there is nothing."""
    inside = _inside(start, offsets, end, HEAD_DIM, WIDTH)
    return tl.load(_pointers(base, strides, start, offsets, WIDTH), mask=inside, other=0.0)


@triton.jit
def _store(base, strides, start, offsets, end, values, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store the rows start + offsets of a matrix where they exist."""
    inside = _inside(start, offsets, end, HEAD_DIM, WIDTH)
    tl.store(_pointers(base, strides, start, offsets, WIDTH), values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(products, rows, columns, sizes, scale, mask, mask_strides, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Return the scores of a block of products, -inf where a query may not see a key.

    `rows` and `columns` are the positions of queries and keys, one along each side of the block.
    """
    queries, keys = sizes[2], sizes[3]
    scores = products * (scale * _LOG2E)
    allowed = columns < keys
    if IS_CAUSAL:
        allowed = allowed & (columns <= rows)
    if MASK != NO_MASK:
        pointers = mask + tl.cast(rows, tl.int64) * mask_strides[2] + tl.cast(columns, tl.int64) * mask_strides[3]
        inside = (rows < queries) & (columns < keys)
        if MASK == BOOLEAN_MASK:
            allowed = allowed & (tl.load(pointers, mask=inside, other=0) != 0)
        else:
            scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    return tl.where(allowed, scores, -_INF)


@triton.jit
def forward_kernel(
    query, key, value, mask, out, row_max, log_total, argmax,
    query_strides, key_strides, value_strides, mask_strides, out_strides, sizes, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS queries of one head over all keys that they see."""
    heads, groups, queries, keys = sizes
    blocks = tl.cdiv(queries, ROWS)
    start = tl.program_id(0) % blocks * ROWS
    batch, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows = start + offsets
    head_key = _head(key, key_strides, batch, head // groups)
    head_value = _head(value, value_strides, batch, head // groups)
    head_mask = _head(mask, mask_strides, batch, head)
    q = _load(_head(query, query_strides, batch, head), query_strides, start, offsets, queries, HEAD_DIM, WIDTH)
    maximum = tl.full([ROWS], -_INF, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.zeros([ROWS], tl.int32)
    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(keys, start + ROWS) if IS_CAUSAL else keys
    for first in range(0, end, COLUMNS):
        k = _load(head_key, key_strides, first, columns, keys, HEAD_DIM, WIDTH)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        positions = (first + columns)[None, :]
        scores = _scores(products, rows[:, None], positions, sizes, scale, head_mask, mask_strides, IS_CAUSAL, MASK)
        # The first of equals: the left one of a block, the earlier one of two blocks.
        block_max, block_best = tl.max(scores, axis=1, return_indices=True)
        best = tl.where(block_max > maximum, first + block_best, best)
        higher = tl.maximum(maximum, block_max)
        # A row that has seen no key yet is shifted by 0: -inf minus -inf is NaN.
        shift = tl.where(higher == -_INF, 0.0, higher)
        exponentials = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(exponentials, axis=1)
        v = _load(head_value, value_strides, first, columns, keys, HEAD_DIM, WIDTH)
        accumulator = tl.dot(exponentials.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")
        maximum = higher
    # The exponential of the sink is 1.
    values = accumulator / (1.0 + total)[:, None]
    _store(_head(out, out_strides, batch, head), out_strides, start, offsets, queries, values, HEAD_DIM, WIDTH)
    line = tl.cast(batch * heads + head, tl.int64) * queries + rows
    tl.store(row_max + line, tl.where(maximum == -_INF, 0.0, maximum), mask=rows < queries)
    tl.store(log_total + line, tl.log2(1.0 + total), mask=rows < queries)
    tl.store(argmax + line, best, mask=rows < queries)


@triton.jit
def query_gradient_kernel(
    query, key, value, mask, out, grad, row_max, log_total, argmax, delta, grad_query,
    query_strides, key_strides, value_strides, mask_strides, out_strides, grad_strides, grad_query_strides,
    sizes, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of ROWS queries of one head, and write down their delta for the other kernel."""
    heads, groups, queries, keys = sizes
    blocks = tl.cdiv(queries, ROWS)
    start = tl.program_id(0) % blocks * ROWS
    batch, head = tl.program_id(0) // blocks // heads, tl.program_id(0) // blocks % heads
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows = start + offsets
    head_key = _head(key, key_strides, batch, head // groups)
    head_value = _head(value, value_strides, batch, head // groups)
    head_mask = _head(mask, mask_strides, batch, head)
    head_grad_query = _head(grad_query, grad_query_strides, batch, head)
    q = _load(_head(query, query_strides, batch, head), query_strides, start, offsets, queries, HEAD_DIM, WIDTH)
    o = _load(_head(out, out_strides, batch, head), out_strides, start, offsets, queries, HEAD_DIM, WIDTH)
    do = _load(_head(grad, grad_strides, batch, head), grad_strides, start, offsets, queries, HEAD_DIM, WIDTH)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    line = tl.cast(batch * heads + head, tl.int64) * queries + rows
    shift = tl.load(row_max + line, mask=rows < queries, other=0.0)
    excess = tl.load(log_total + line, mask=rows < queries, other=0.0)
    best = tl.load(argmax + line, mask=rows < queries, other=0)
    tl.store(delta + line, row_delta, mask=rows < queries)
    sink = -tl.exp2(-excess) * row_delta
    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(keys, start + ROWS) if IS_CAUSAL else keys
    for first in range(0, end, COLUMNS):
        k = _load(head_key, key_strides, first, columns, keys, HEAD_DIM, WIDTH)
        v = _load(head_value, value_strides, first, columns, keys, HEAD_DIM, WIDTH)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        positions = (first + columns)[None, :]
        scores = _scores(products, rows[:, None], positions, sizes, scale, head_mask, mask_strides, IS_CAUSAL, MASK)
        # Shifted first: the difference of two numbers near each other is exact.
        probabilities = tl.exp2(scores - shift[:, None] - excess[:, None])
        grad_scores = probabilities * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None])
        grad_scores += tl.where(positions == best[:, None], sink[:, None], 0.0)
        accumulator = tl.dot(grad_scores.to(k.dtype), k, accumulator, input_precision="ieee")
    _store(head_grad_query, grad_query_strides, start, offsets, queries, accumulator * scale, HEAD_DIM, WIDTH)


@triton.jit
def key_gradient_kernel(
    query, key, value, mask, grad, row_max, log_total, argmax, delta, grad_key, grad_value,
    query_strides, key_strides, value_strides, mask_strides, grad_strides, grad_key_strides, grad_value_strides,
    sizes, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of COLUMNS keys and values of one key head, from all query heads that share it."""
    heads, groups, queries, keys = sizes
    blocks, kv_heads = tl.cdiv(keys, COLUMNS), heads // groups
    first = tl.program_id(0) % blocks * COLUMNS
    batch, kv_head = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    positions = (first + columns)[:, None]
    head_grad_key = _head(grad_key, grad_key_strides, batch, kv_head)
    head_grad_value = _head(grad_value, grad_value_strides, batch, kv_head)
    k = _load(_head(key, key_strides, batch, kv_head), key_strides, first, columns, keys, HEAD_DIM, WIDTH)
    v = _load(_head(value, value_strides, batch, kv_head), value_strides, first, columns, keys, HEAD_DIM, WIDTH)
    key_accumulator = tl.zeros([COLUMNS, WIDTH], tl.float32)
    value_accumulator = tl.zeros([COLUMNS, WIDTH], tl.float32)
    begin = first // ROWS * ROWS if IS_CAUSAL else 0
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        head_query = _head(query, query_strides, batch, head)
        head_grad = _head(grad, grad_strides, batch, head)
        head_mask = _head(mask, mask_strides, batch, head)
        for start in range(begin, queries, ROWS):
            rows = start + offsets
            line = tl.cast(batch * heads + head, tl.int64) * queries + rows
            q = _load(head_query, query_strides, start, offsets, queries, HEAD_DIM, WIDTH)
            do = _load(head_grad, grad_strides, start, offsets, queries, HEAD_DIM, WIDTH)
            shift = tl.load(row_max + line, mask=rows < queries, other=0.0)
            excess = tl.load(log_total + line, mask=rows < queries, other=0.0)
            best = tl.load(argmax + line, mask=rows < queries, other=0)
            row_delta = tl.load(delta + line, mask=rows < queries, other=0.0)
            # Everything is transposed here: [COLUMNS, ROWS].
            products = tl.dot(k, tl.trans(q), input_precision="ieee")
            scores = _scores(products, rows[None, :], positions, sizes, scale, head_mask, mask_strides, IS_CAUSAL, MASK)
            probabilities = tl.exp2(scores - shift[None, :] - excess[None, :])
            value_accumulator = tl.dot(probabilities.to(do.dtype), do, value_accumulator, input_precision="ieee")
            grad_scores = probabilities * (tl.dot(v, tl.trans(do), input_precision="ieee") - row_delta[None, :])
            sink = -tl.exp2(-excess) * row_delta
            grad_scores += tl.where(positions == best[None, :], sink[None, :], 0.0)
            key_accumulator = tl.dot(grad_scores.to(q.dtype), q, key_accumulator, input_precision="ieee")
    _store(head_grad_key, grad_key_strides, first, columns, keys, key_accumulator * scale, HEAD_DIM, WIDTH)
    _store(head_grad_value, grad_value_strides, first, columns, keys, value_accumulator, HEAD_DIM, WIDTH)
