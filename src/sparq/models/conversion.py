"""Conversion of a causal LM to another attention, in place."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sparq.attention import CHILD, IMPLEMENTATION, AttentionSpec, OutlierFreeAttention, register_attention
from sparq.attention.packed import without_mask
from sparq.errors import SparqError
from sparq.models.families import attention_layers, family_of

CONFIG_KEY = "sparq_attention"
"""Where a model's config keeps its variant."""


def convert(model: PreTrainedModel, attention: str | AttentionSpec, *, replace: bool = False) -> PreTrainedModel:
    """Replace the attention of a causal LM in place and note it in its config.

    Everything else stays: weights, generation, PEFT, `save_pretrained`. Weights that the variant brings (a learned
    sink, a gate) are in every attention layer's `outlier_free` and are saved with the model; `load_model` loads them.

    Args:
        model: a causal LM of a supported family.
        attention: the variant, see `sparq.attention.spec`.
        replace: allow another variant than the one that the config names, for a model that was adapted to that one.

    Returns:
        The same model.

    Raises:
        SparqError: the family or the variant is not supported, or the config names another variant already.
    """
    spec = AttentionSpec.parse(attention)
    family_of(model)
    saved = saved_attention(model)
    # From the pretrained softmax every way is open: that is what conversion is for.
    if saved not in (None, AttentionSpec(), spec) and not replace:
        assert saved is not None
        raise SparqError(
            f"this model was adapted with attention {saved.name!r}, not {spec.name!r}: load it as {saved.name!r},"
            " or say replace=True"
        )
    register_attention()
    for layer in attention_layers(model):
        present = getattr(layer, CHILD, None)
        if isinstance(present, OutlierFreeAttention) and present.spec == spec:
            continue  # with its weights
        if isinstance(present, OutlierFreeAttention):
            present.detach()
        _attach(model, layer, spec)
    decoder = model.get_decoder()
    if without_mask not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(without_mask, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)
    setattr(model.config, CONFIG_KEY, spec.to_config())
    return model


def saved_attention(model: PreTrainedModel) -> AttentionSpec | None:
    """Return the variant that a model's config names, if it names one."""
    saved = getattr(model.config, CONFIG_KEY, None)
    return None if saved is None else AttentionSpec.parse(saved)


def converted_layers(model: torch.nn.Module) -> list[OutlierFreeAttention]:
    """Return what `convert` put into each attention layer, in order; nothing for a model as it was."""
    return [module for module in model.modules() if isinstance(module, OutlierFreeAttention)]


def attention_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that a variant brought (learned sinks, gates), by name; nothing for most variants."""
    return {
        f"{path}.{name}": parameter
        for path, layer in model.named_modules()
        if isinstance(layer, OutlierFreeAttention)
        for name, parameter in layer.named_parameters()
    }


@contextlib.contextmanager
def recording_attention(model: PreTrainedModel) -> Iterator[list[OutlierFreeAttention]]:
    """Make a model write its probabilities out, and yield the attention of each layer, first to last, to be watched.

    Fused attention has none. A converted model writes them out while this lasts. One with transformers' own attention
    runs `vanilla` of this package meanwhile, the same function, and is afterwards as it was.

    Raises:
        SparqError: the model's attention is another one, of which nothing can be seen.
    """
    name = model.config._attn_implementation
    layers = converted_layers(model)
    watchable = (IMPLEMENTATION,) if layers else ("eager", "sdpa")
    if name not in watchable:
        raise SparqError(
            f"attention {name!r} returns no probabilities: call model.set_attn_implementation({watchable[0]!r}) first"
        )
    visited = [] if layers else attention_layers(model)
    if visited:
        register_attention()
        layers = [_attach(model, layer, AttentionSpec()) for layer in visited]
        model.set_attn_implementation(IMPLEMENTATION)
    for attention in layers:
        attention.recording = True
    try:
        yield layers
    finally:
        for attention in layers:
            attention.recording = False
        if visited:
            for layer, attention in zip(visited, layers, strict=True):
                attention.detach()
                delattr(layer, CHILD)
            model.set_attn_implementation(name)


def _attach(model: PreTrainedModel, layer: torch.nn.Module, spec: AttentionSpec) -> OutlierFreeAttention:
    heads = model.config.num_attention_heads
    attention = OutlierFreeAttention(
        spec,
        hidden=model.config.hidden_size,
        heads=heads,
        head_dim=getattr(model.config, "head_dim", None) or model.config.hidden_size // heads,
        # A quantized layer has no parameters left.
        like=next(p for p in itertools.chain(layer.parameters(), model.parameters()) if p.is_floating_point()),
    )
    attention.attach(layer)
    return attention
