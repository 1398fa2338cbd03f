"""Conversion of a causal LM to another attention, in place."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sparq.attention import CHILD, IMPLEMENTATION, AttentionSpec, OutlierFreeAttention, register_attention
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
        heads = model.config.num_attention_heads
        like = next(p for p in layer.parameters() if p.is_floating_point())
        converted = OutlierFreeAttention(
            spec,
            hidden=model.config.hidden_size,
            heads=heads,
            head_dim=getattr(model.config, "head_dim", None) or model.config.hidden_size // heads,
            like=like,
        )
        converted.attach(layer)
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


@contextlib.contextmanager
def recording_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a model return its probabilities under `output_attentions=True`, whatever its family and attention.

    Fused attention has none; a converted model writes them out while this lasts, one with PyTorch's own runs
    transformers' eager function, the same formula. Any other is left as it is.
    """
    name = model.config._attn_implementation
    layers = converted_layers(model)
    replaced = not layers and name == "sdpa"
    if replaced:
        model.set_attn_implementation("eager")
    for layer in layers:
        layer.recording = True
    try:
        yield
    finally:
        for layer in layers:
            layer.recording = False
        if replaced:
            model.set_attn_implementation(name)
