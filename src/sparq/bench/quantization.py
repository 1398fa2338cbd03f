"""Whole models at several precisions against bfloat16: one more token over a cache, and a prompt."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sparq.bench.interleaved import Ratio, interleave
from sparq.devices import synchronize
from sparq.errors import SparqError
from sparq.models import load_model
from sparq.process_memory import peak_bytes
from sparq.quantization import QuantizationScheme, quantize, to_integers

Work = Literal["decode", "prefill"]
WORK: tuple[Work, ...] = get_args(Work)
FLOATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULT_PRECISIONS = ("float32", "w8a8", "w8a8-e8", "w8a16-e8", "w4a16-g64", "w4a16-g64-e8", "w4a16-g32-e8", "w4a4-e8")
CPU = torch.device("cpu")
_BASELINE = "bfloat16"
_NAME = re.compile(r"w(\d+)a(\d+)(?:-g(\d+))?(?:-e(\d+))?")


@dataclass(frozen=True, kw_only=True)
class QuantizationSpeed:
    """What came out for one precision.

    Attributes:
        work: one token over a cache of as many tokens as the prompt has, or the prompt without a cache before it.
        precision: as `scheme_named` reads it, or a floating-point type.
        time: by the same model in bfloat16.
        weights: bytes of all parameters and buffers, one that has two names counted once.
        peak: bytes that the process grew by during a call; None where it cannot be told.
    """

    work: Work
    precision: str
    time: Ratio
    weights: int
    peak: int | None


def scheme_named(name: str) -> QuantizationScheme:
    """Return the rounding to nearest that a name like `w4a16-g64-e8` stands for.

    Bits of weights and activations come first, then the size of the weights' groups and the bits of embedding and head,
    where they are not whole rows and 16 bits.

    Raises:
        SparqError: the name is not of this form, or its numbers are not those of a scheme.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise SparqError(
            f"{name!r} is not a precision: expected {' or '.join(FLOATS)}, or for example w8a8 or w4a16-g64-e8"
        )
    weights, activations, group, embedding = (None if part is None else int(part) for part in found.groups())
    optional = {} if embedding is None else {"embedding_bits": embedding}
    return QuantizationScheme.from_dict(
        {"method": "rtn", "weight_bits": weights, "activation_bits": activations, "group_size": group, **optional}
    )


def bench_quantization(
    reference: str,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    *,
    length: int = 256,
    rounds: int = 9,
    compiled: bool = False,
    work: Sequence[Work] = WORK,
    device: torch.device = CPU,
) -> Iterator[QuantizationSpeed]:
    """Compare precisions of one model with bfloat16, all in memory at once, in turn.

    Quantized models are made of the bfloat16 one and compute with integers. A prompt's logits are those of its last
    token. Compiled models are compiled whole, once for each kind of work, and decode over a cache of fixed size.

    Args:
        reference: a folder, a hub name or `pretrained:NAME`.
        precisions: names; bfloat16 is always there, and compared with itself.
        length: tokens of the prompt and of the cache.
        rounds: how often each runs.
        compiled: run each by `torch.compile`.
        work: which of the two.
        device: where.

    Raises:
        SparqError: a name is wrong, or a model cannot compute with the integers of one.
    """
    schemes = {name: None if name in FLOATS else scheme_named(name) for name in (_BASELINE, *precisions)}
    base = load_model(reference, dtype=torch.bfloat16).to(device)
    models: dict[str, PreTrainedModel] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            models[name] = to_integers(quantize(base, scheme=scheme))
        else:
            models[name] = base if name == _BASELINE else load_model(reference, dtype=FLOATS[name]).to(device)
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (1, length)).to(device)
    for kind in work:
        step = _decoder if kind == "decode" else _prefiller
        runs = {name: step(model, ids, compiled=compiled) for name, model in models.items()}
        # All models are compilations of one function to PyTorch, which runs those past its limit of 8 uncompiled.
        with torch._dynamo.config.patch(recompile_limit=len(models) * len(work)):
            ratios = interleave(runs, baseline=_BASELINE, rounds=rounds, synchronize=lambda: synchronize(device))
        for name, ratio in ratios.items():
            peak = peak_bytes(runs[name], device)
            yield QuantizationSpeed(
                work=kind, precision=name, time=ratio, weights=weight_bytes(models[name]), peak=peak
            )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; what has two names is counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prefiller(model: PreTrainedModel, ids: Tensor, *, compiled: bool) -> Callable[[], object]:
    forward = torch.compile(model, dynamic=False) if compiled else model

    def prefill() -> object:
        with torch.no_grad():
            return forward(ids, use_cache=True, logits_to_keep=1)

    return prefill


def _decoder(model: PreTrainedModel, ids: Tensor, *, compiled: bool) -> Callable[[], object]:
    length = ids.shape[1]
    if not compiled:
        growing = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=growing, use_cache=True, logits_to_keep=1)

        def decode() -> object:
            with torch.no_grad():
                output = model(ids[:, :1], past_key_values=growing, use_cache=True)
            growing.crop(-1)
            return output

        return decode
    fixed = StaticCache(config=model.config, max_cache_len=length + 1)
    with torch.no_grad():
        model(ids, past_key_values=fixed, use_cache=True, logits_to_keep=1)
    forward: Callable[..., object] = torch.compile(model, dynamic=False)

    def decode_compiled() -> object:
        for layer in fixed.layers:
            layer.cumulative_length.fill_(length)
        with torch.no_grad():
            return forward(ids[:, :1], past_key_values=fixed, use_cache=True)

    return decode_compiled
