"""Every fused attention against `scaled_dot_product_attention`, on one layer's queries, keys and values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from sparq.attention import AttentionSpec, OutlierFreeAttention
from sparq.bench.interleaved import Ratio, interleave
from sparq.devices import synchronize
from sparq.process_memory import peak_bytes

Pass = Literal["forward", "forward+backward", "decode"]
PASSES: tuple[Pass, ...] = get_args(Pass)
BASELINE = "sdpa"
TRAINED = ("softmax1", "learned_sink", "max_shift")
_PEAKS = 3
DECODED = (*TRAINED, "none", "l1", "mean", "clipped", "softmax1+gated")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One comparison.

    Attributes:
        kind: causal forward, the same with its backward, or one query over a cache of `length` keys.
        length: keys, and queries but for decoding.
        dtype: of queries, keys and values.
        batch: sequences.
        heads: query heads; the default shape is SmolLM2-135M's.
        kv_heads: key heads.
        head_dim: width of a head.
    """

    kind: Pass
    length: int
    dtype: torch.dtype
    batch: int = 1
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out for one case and variant.

    Attributes:
        case: what was compared.
        variant: name of the attention, or `sdpa` for the baseline against itself.
        time: by the baseline's.
        memory: peak memory by the baseline's; None where it cannot be told.
    """

    case: AttentionCase
    variant: str
    time: Ratio
    memory: float | None


def default_cases(
    dtypes: Sequence[torch.dtype], lengths: Sequence[int], kinds: Sequence[Pass] = PASSES
) -> list[AttentionCase]:
    """Return the cases of the benchmark table; decoding starts at 1024 keys."""
    return [
        AttentionCase(kind=kind, length=length, dtype=dtype)
        for dtype in dtypes
        for kind in kinds
        for length in lengths
        if kind != "decode" or length >= 1024
    ]


def bench_attention(
    cases: Iterable[AttentionCase], *, rounds: int, device: torch.device, variants: Sequence[str] = ()
) -> Iterator[Measured]:
    """Compare the variants with the baseline, case by case.

    Args:
        cases: what to compare.
        rounds: how often each runs.
        device: where.
        variants: which; all that have a fast path for the case if empty.
    """
    for case in cases:
        torch.manual_seed(0)
        shape = (case.batch, case.kv_heads, case.length, case.head_dim)
        queries = 1 if case.kind == "decode" else case.length
        query = torch.randn(case.batch, queries, case.heads, case.head_dim, dtype=case.dtype, device=device)
        query = query.transpose(1, 2)
        key, value = (torch.randn(shape, dtype=case.dtype, device=device) for _ in range(2))
        names = variants or (DECODED if case.kind == "decode" else TRAINED)
        runs = {BASELINE: _step(case, query, key, value, _sdpa)}
        for name in names:
            runs[name] = _step(case, query, key, value, _attention(name, case, query))

        ratios = interleave(runs, baseline=BASELINE, rounds=rounds, synchronize=lambda: synchronize(device))
        peaks = {name: _peak(run, device) for name, run in runs.items()}
        base = peaks[BASELINE]
        for name, ratio in ratios.items():
            own = peaks[name]
            # Less than a megabyte is below what the pages of a process can tell.
            memory = own / base if own is not None and base is not None and base > 1 << 20 else None
            yield Measured(case=case, variant=name, time=ratio, memory=memory)


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the least of several peaks: the heap keeps holes by chance, of up to half of what `max_shift` needs."""
    peaks = [peak_bytes(run, device) for _ in range(_PEAKS)]
    return min((peak for peak in peaks if peak is not None), default=None)


_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.shape[2] == 1:
        # As transformers does: the query heads of one key head become queries of it, up to ten times as fast.
        folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        return functional.scaled_dot_product_attention(folded, key, value).view(query.shape)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def _attention(name: str, case: AttentionCase, like: Tensor) -> _Attend:
    layer = OutlierFreeAttention(
        AttentionSpec.parse(name),
        hidden=case.heads * case.head_dim,
        heads=case.heads,
        head_dim=case.head_dim,
        like=like,
    ).to(like.device)
    if layer.sink is not None:
        layer.sink.requires_grad_(case.kind == "forward+backward")
    hidden_states = like.transpose(1, 2).reshape(like.shape[0], like.shape[2], -1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer.gate is not None:
            layer.take_gates(hidden_states)
        output: Tensor = layer(query, key, value, None, scaling=case.head_dim**-0.5)[0]
        return output.transpose(1, 2)

    return attend


def _step(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor, attend: _Attend) -> Callable[[], object]:
    if case.kind != "forward+backward":

        def forward() -> object:
            with torch.no_grad():
                return attend(query, key, value)

        return forward
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    gradient = torch.randn_like(query)

    def both() -> object:
        return torch.autograd.grad(attend(*inputs), inputs, gradient)

    return both
