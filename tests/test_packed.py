"""Padding-free batches: documents in one row against each document alone, of every family and variant."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DataCollatorWithFlattening

from model_families import FAMILIES, tiny_model
from sparq.attention import IMPLEMENTATION, AttentionSpec, OutlierFreeAttention, reference_attention
from sparq.attention.fused_cuda import PackedFlashKernel, packed_kernel
from sparq.attention.packed import Documents
from sparq.attention.short_documents import Sink, short_documents_attention
from sparq.errors import SparqError
from sparq.models import convert, converted_layers, recording_attention

NAMES = ["vanilla", "softmax1", "max_shift", "learned_sink", "mean", "softmax1+clipped", "softmax1+gated"]
LENGTHS = (5, 1, 9, 3)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(4, 96, (length,)) for length in lengths]


def packed(lengths: tuple[int, ...] = LENGTHS) -> dict[str, object]:
    """What transformers' own collator makes of them."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids.tolist()} for ids in documents(lengths)])
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture(params=[256, 4, 0])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents are short, some are, none is."""
    monkeypatch.setattr("sparq.attention.packed.SHORT", request.param)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_row_is_its_documents(family: str, name: str) -> None:
    model = convert(tiny_model(family), name).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    alone = torch.cat([model(ids[None], use_cache=False).logits for ids in documents()], dim=1)
    together = model(**packed(), use_cache=False).logits
    assert (together - alone).norm() <= 1e-5 * alone.norm()
    grad = torch.randn_like(alone)
    mine, theirs = (torch.autograd.grad(x, weights, grad, allow_unused=True) for x in (together, alone))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        # Some are 0 but for rounding: a bias of keys moves all scores of a row alike.
        assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(**packed(), use_cache=False).logits, together, atol=1e-3, rtol=1e-4)


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: object) -> None:
        raise AssertionError("a mask of all tokens by all tokens")

    model = convert(tiny_model("llama"), "softmax1")
    monkeypatch.setitem(transformers_masks(), IMPLEMENTATION, never)
    model(**packed(), use_cache=False)


def transformers_masks() -> dict[str, object]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mapping: dict[str, object] = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return mapping


def test_probabilities_of_a_packed_row_are_blocks() -> None:
    model = convert(tiny_model("llama"), "softmax1")
    with torch.no_grad(), recording_attention(model):
        attentions = model(**packed(), use_cache=False, output_attentions=True).attentions
        alone = [model(ids[None], use_cache=False, output_attentions=True).attentions for ids in documents()]
    for layer, probabilities in enumerate(attentions):
        for head in range(4):
            blocks = torch.block_diag(*(one[layer][0, head] for one in alone))
            torch.testing.assert_close(probabilities[0, head], blocks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_mask_says_the_same(window: int | None) -> None:
    """Against the reference with the mask of `Documents`."""
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    row = Documents(starts=starts, longest=max(LENGTHS), window=window)
    assert row.mask().sum() == sum(min(n + 1, window or 99) for length in LENGTHS for n in range(length))
    spec = AttentionSpec.parse("softmax1")
    masked, _ = reference_attention(query, key, value, row.mask(), spec=spec, scaling=0.3)
    each = row.attend_each(lambda *qkvm: reference_attention(*qkvm, spec=spec, scaling=0.3)[0], None, query, key, value)
    torch.testing.assert_close(each, masked)


@pytest.mark.parametrize("lengths", [(1,), (3, 3), (7, 1, 20, 2)])
@pytest.mark.parametrize("name", ["vanilla", "softmax1", "learned_sink", "max_shift"])
def test_short_documents_equal_the_reference(name: str, lengths: tuple[int, ...]) -> None:
    tokens = sum(lengths)
    query, key, value = (
        torch.randn(1, tokens, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for heads in (6, 2, 2)
    )
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True) if name == "learned_sink" else None
    zero = torch.zeros(6, dtype=torch.float64)
    sinks: dict[str, Sink] = {"vanilla": "none", "max_shift": "maximum", "softmax1": zero}
    sink = sinks.get(name, zero if logits is None else logits)
    spec = AttentionSpec.parse(name)
    ours = short_documents_attention(query, key, value, sink, lengths, scaling=0.4)
    each = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    theirs = torch.cat([reference_attention(*x, None, spec=spec, scaling=0.4, sink=logits)[0] for x in each], dim=1)
    torch.testing.assert_close(ours, theirs)
    wanted = [query, key, value, *([] if logits is None else [logits])]
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink", ["none", "maximum", "zero"])
def test_extreme_logits_of_short_documents_stay_finite(sink: str, dtype: torch.dtype, level: float) -> None:
    query = torch.full((1, 4, 9, 8), level / 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, 2, 9, 8).add(1).to(dtype).requires_grad_() for _ in range(2))
    logits: Sink = torch.zeros(4) if sink == "zero" else sink  # type: ignore[assignment]
    out = short_documents_attention(query, key, value, logits, (4, 5), scaling=1.0)
    out.float().square().sum().backward()
    for x in (out, query.grad, key.grad, value.grad):
        assert x is not None
        assert x.isfinite().all()


def test_a_copy_and_a_second_conversion_keep_one_hook() -> None:
    model = convert(convert(tiny_model("llama"), "softmax1"), "max_shift", replace=True)
    again = convert(copy.deepcopy(model), "max_shift")
    assert len(again.get_decoder()._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_ids": None}, "without position_ids"),
        ({"attention_mask": torch.ones(1, sum(LENGTHS))}, "with an attention_mask"),
        ({"use_cache": True, "past": 2}, "without a cache"),
        ({"rows": 2}, "one row"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes: dict[str, object], message: str) -> None:
    model = convert(tiny_model("llama"), "softmax1")
    inputs = {"use_cache": False, **packed(), **changes}
    if inputs.pop("past", None):
        inputs["past_key_values"] = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    if inputs.pop("rows", None):
        inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
    with pytest.raises(SparqError, match=message):
        model(**inputs)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(("dtype", "taken"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_who_takes_packed_queries_on_a_gpu(dtype: torch.dtype, taken: bool) -> None:
    query = torch.randn(1, 4, 20, 64, dtype=dtype, device="cuda")
    row = Documents(starts=torch.tensor([0, 20], dtype=torch.int32, device="cuda"), longest=20)
    assert isinstance(packed_kernel(query, row), PackedFlashKernel) == taken


@pytest.mark.parametrize("name", ["vanilla", "softmax1", "learned_sink"])
def test_the_packed_op_is_called_rightly(name: str) -> None:
    """On tensors without numbers the op checks what it is given."""
    query, key, value = (
        torch.randn(1, 18, heads, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    )
    layer = OutlierFreeAttention(AttentionSpec.parse(name), hidden=256, heads=4, head_dim=64, like=query)
    assert layer.has_sink_kernel
    row = Documents(starts=torch.empty(5, dtype=torch.int32, device="meta"), longest=9, window=4)
    out = layer.attend_packed(query, key, value, PackedFlashKernel(documents=row), scaling=0.125)
    assert out.shape == (1, 18, 4, 64)
    wanted = [query, key, value, *layer.parameters()]
    for x, grad in zip(wanted, torch.autograd.grad(out, wanted, torch.randn_like(out)), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
@pytest.mark.parametrize("name", ["vanilla", "softmax1", "learned_sink", "max_shift"])
def test_cuda_equals_each_document_alone(name: str) -> None:
    lengths = (300, 17, 1, 90)
    model = convert(tiny_model("llama"), name).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    inputs = {n: x.to("cuda") if isinstance(x, Tensor) else x for n, x in packed(lengths).items()}
    with torch.no_grad():
        mine = model(**inputs, use_cache=False).logits.float()
        theirs = torch.cat([exact(ids[None].cuda(), use_cache=False).logits for ids in documents(lengths)], dim=1)
    assert len(converted_layers(model)) == 2
    assert (mine - theirs).norm() <= 5e-2 * theirs.norm()
