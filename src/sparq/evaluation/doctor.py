"""What would go wrong with a model, found by running it and by looking at how it is put together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel

from sparq.attention import IMPLEMENTATION, OutlierFreeAttention
from sparq.evaluation.observation import evaluating, observe
from sparq.evaluation.seen_attention import SeenAttention
from sparq.models import converted_layers, saved_attention
from sparq.models.families import is_pre_norm

Severity = Literal["fault", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the doctor has to say.

    Attributes:
        severity: `fault`: results are wrong. `warning`: they will be, after something usual. `note`: to be known.
        what: the finding, with its numbers.
        remedy: what to do.
    """

    severity: Severity
    what: str
    remedy: str


@torch.no_grad()
def examine(model: PreTrainedModel, input_ids: Int[Tensor, " length"]) -> list[Finding]:
    """Look for what spoils results without an error message.

    Args:
        model: a causal LM of a supported family, converted or not.
        input_ids: a sequence of 8 or more ordinary tokens to run it on.

    Returns:
        Findings, faults first.
    """
    assert len(input_ids) >= 8, "a few tokens to run on"
    with evaluating(model):
        findings = [
            *_variant(model), *_masks(model, input_ids), *_activations(model, input_ids), *_logits(model, input_ids),
            *_structure(model),
        ]  # fmt: skip
    order: list[Severity] = ["fault", "warning", "note"]
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _variant(model: PreTrainedModel) -> Iterator[Finding]:
    spec, layers = saved_attention(model), converted_layers(model)
    implementation = model.config._attn_implementation
    if spec is not None and not layers:
        yield Finding(
            severity="fault",
            what=f"config.json names the attention {spec.name!r}, but the layers run the pretrained softmax:"
            " transformers loaded the model by itself, and left out what it does not know",
            remedy="load it with sparq.load_model",
        )
    elif layers and implementation != IMPLEMENTATION:
        yield Finding(
            severity="fault",
            what=f"the layers were converted to {layers[0].spec.name!r}, but the attention implementation is"
            f" {implementation!r}, which knows no sink, clip or gate",
            remedy=f"model.set_attn_implementation({IMPLEMENTATION!r})",
        )
    elif {layer.spec for layer in layers} - {spec}:
        yield Finding(
            severity="fault",
            what="the layers do not all have the attention that config.json names",
            remedy="call sparq.convert(model, NAME, replace=True)",
        )
    if AttentionMaskInterface().get(implementation) is None and implementation != "eager":
        yield Finding(
            severity="fault",
            what=f"the attention {implementation!r} has no mask function of its name: it gets no mask",
            remedy="register one with transformers.AttentionMaskInterface",
        )
    if getattr(model.generation_config, "cache_implementation", None) == "quantized" and layers:
        yield Finding(
            severity="note",
            what="generation uses a quantized cache: sinks here are no keys, so it cannot drop them, but rounded keys"
            " move every score",
            remedy="measure the perplexity with it",
        )


def _masks(model: PreTrainedModel, ids: Int[Tensor, " length"]) -> Iterator[Finding]:
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    ids = ids[:8].to(model.device)
    plain = model(ids[None]).logits[0].float()
    if not plain.isfinite().all():
        yield Finding(
            severity="fault", what="the logits of plain text are not finite", remedy="run it in float32 or bfloat16"
        )
        return
    other = ids.clone()
    other[-1] = ids[0]
    changed = _distance(model(other[None]).logits[0, :-1].float(), plain[:-1])
    if changed > tolerance:
        yield Finding(
            severity="fault",
            what=f"the last token changes the logits of those before it, by {100 * changed:.1f} %: causality is lost",
            remedy="the attention ignores its mask or got none; register a mask function of its name",
        )
    padded = torch.cat([ids[:3], ids])[None]
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[0, 3:].float()
    if not logits.isfinite().all():
        yield Finding(
            severity="fault",
            what="with padding on the left the logits are not finite: rows that see no key",
            remedy="shift by max(row maximum, sink), and give 0 to a row without keys",
        )
    elif _distance(logits, plain) > tolerance:
        yield Finding(
            severity="fault",
            what=f"padding on the left changes the logits of real tokens, by {100 * _distance(logits, plain):.1f} %",
            remedy="the attention ignores its padding mask",
        )


def _distance(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    return float((a - b).norm() / b.norm())


def _activations(model: PreTrainedModel, ids: Int[Tensor, " length"]) -> Iterator[Finding]:
    largest, finals = 0.0, [0.0]
    spread = 0.0

    def on_hidden(_index: int, hidden: Float[Tensor, "batch length width"]) -> None:
        nonlocal largest, spread
        size = hidden.float().abs()
        largest = max(largest, float(size.amax()))
        # Of a token, how far its largest element is above its median one.
        ratio = size.amax(dim=-1) / size.median(dim=-1).values.clamp(min=1e-30)
        spread = max(spread, float(ratio.amax()))

    observe(
        model, ids[None].to(model.device), torch.ones_like(ids[None]), on_hidden=on_hidden,
        on_final_norm=lambda hidden: finals.append(float(hidden.float().abs().amax())),
    )  # fmt: skip
    if largest > torch.finfo(torch.float16).max / 4:
        yield Finding(
            severity="warning",
            what=f"a layer's output reaches {largest:,.0f}, and float16 ends at 65,504",
            remedy="run it in bfloat16 or float32",
        )
    if spread > 2 * 7:
        yield Finding(
            severity="warning",
            what=f"the largest element of a token is up to {spread:,.0f} times its median one: with symmetric 4-bit"
            " activations, whose steps are 1/7 of the largest, half of that token's elements round to 0",
            remedy="adapt with an outlier-free attention, or move outliers into weights before rounding (SmoothQuant)",
        )
    if max(finals) > largest:
        yield Finding(
            severity="note",
            what=f"the final norm's output reaches {max(finals):,.1f}, more than any layer's ({largest:,.1f}): a"
            " maximum over everything would be the norm's gain",
            remedy="compare max_inf_norm of layer outputs, as measure_outliers reports it",
        )


def _logits(model: PreTrainedModel, ids: Int[Tensor, " length"]) -> Iterator[Finding]:
    layers = converted_layers(model)
    unshifted = any(layer.spec.normalization == "none" for layer in layers)
    if not unshifted or model.config._attn_implementation != IMPLEMENTATION:
        return
    largest = -math.inf

    def on_attention(index: int, seen: SeenAttention) -> None:
        nonlocal largest
        if layers[index].spec.normalization == "none":
            largest = max(largest, float(seen.visible_scores().amax()))

    observe(model, ids[None], torch.ones_like(ids[None]), on_attention=on_attention)
    yield Finding(
        severity="fault" if largest > 88 else "warning",
        what=f"attention 'none' exponentiates scores as they are; they reach {largest:,.1f} here, and exp overflows"
        " at 88.7",
        remedy="use softmax1, the same function without the overflow",
    )


def _structure(model: PreTrainedModel) -> Iterator[Finding]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        yield Finding(
            severity="fault",
            what="config.json ties embedding and head, but they are two tensors: saving keeps one of them",
            remedy="model.tie_weights(), or set tie_word_embeddings to false before saving",
        )
    elif tied:
        yield Finding(
            severity="note",
            what="embedding and head are one tensor: training or quantizing one of them changes both, or unties them",
            remedy="decide which, and train or save them together",
        )
    if not is_pre_norm(model):
        yield Finding(
            severity="note",
            what="norms stand after the sublayers (OPT-350m): no linear layer reads a norm alone, so SmoothQuant scales"
            " inputs at run time instead of in the norms; and layer outputs are normed, so their max norm is of gains",
            remedy="do not compare its max norm with that of pre-norm models",
        )
    for module in model.modules():
        logit = module.logit if isinstance(module, OutlierFreeAttention) else None
        if logit is not None and not logit.isfinite().all():
            yield Finding(
                severity="note",
                what="a sink is at -inf: the model stands at the start of its schedule and is the pretrained softmax",
                remedy="call SinkSchedule.set before each update",
            )
            break
