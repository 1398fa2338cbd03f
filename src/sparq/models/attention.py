"""The variants as transformers attention functions, registered together with their mask functions.

A function that is registered without a mask function of the same name receives no mask at all, and causality and
padding vanish silently; `register_attention` registers both.
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparq.errors import SparqError
from sparq.models.families import family_of
from sparq.models.softmax import ATTENTION_VARIANTS, AttentionVariant, attention_probabilities, check_variant

CONFIG_KEY = "sparq_attention"
"""Where a model's config keeps the name of its variant."""


SHORT = 256
"""Keys up to which training writes the probabilities out: on a CPU the fused backward costs more than it saves there.

SmolLM2-135M, bfloat16, LoRA, batches of 640 tokens, one thread each side by side: 2.4 s an update fused, 1.8 s written
out.
"""


def implementation_name(variant: AttentionVariant) -> str:
    """Return the name under which transformers knows a variant."""
    return f"sparq_{variant}"


def reference_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    allowed: Bool[Tensor, "batch #heads queries keys"] | None,
    *,
    variant: AttentionVariant,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch queries heads head_dim"], Float[Tensor, "batch heads queries keys"]]:
    """Compute attention with its probabilities written out, in float32 between the two products.

    Without a mask a query sees the keys up to its own position, as many as there are queries.

    Args:
        query: queries of every head.
        key: keys; query head h reads key head h // (heads / kv_heads).
        value: values, likewise.
        allowed: True where a query may see a key; None is causal.
        variant: the normalization.
        scaling: factor on the query-key products.
        dropout: rate of dropped probabilities.

    Returns:
        The output, queries before heads as transformers wants it, and the probabilities.
    """
    batch, heads, queries, head_dim = query.shape
    groups = heads // key.shape[1]
    if allowed is None and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        allowed = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    keys = key.shape[2]
    # A group of query heads shares its keys: folded into the rows, no key is copied.
    # [batch kv_heads groups*queries head_dim]
    rows = (query * scaling).reshape(batch, heads // groups, groups * queries, head_dim)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, heads, queries, keys)
    probabilities = attention_probabilities(scores.float(), allowed, variant).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=dropout > 0)
    output = torch.matmul(probabilities.view(batch, heads // groups, groups * queries, keys), value)
    # [batch heads queries head_dim] -> [batch queries heads head_dim]
    return output.view(batch, heads, queries, head_dim).transpose(1, 2).contiguous(), probabilities


def _forward(
    variant: AttentionVariant,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    write_out = kwargs.get("output_attentions") or (torch.is_grad_enabled() and key.shape[2] <= SHORT)
    if variant == "vanilla" and not write_out:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    return reference_attention(
        query,
        key,
        value,
        attention_mask,
        variant=variant,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )


def _vanilla(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    return _forward("vanilla", *args, **kwargs)  # type: ignore[arg-type]


def _softmax1(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    return _forward("softmax1", *args, **kwargs)  # type: ignore[arg-type]


def _max_shift(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    return _forward("max_shift", *args, **kwargs)  # type: ignore[arg-type]


_FUNCTIONS = {"vanilla": _vanilla, "softmax1": _softmax1, "max_shift": _max_shift}


def register_attention() -> None:
    """Make the variants known to transformers, each with a boolean mask; doing it again changes nothing."""
    for variant in ATTENTION_VARIANTS:
        AttentionInterface.register(implementation_name(variant), _FUNCTIONS[variant])
        AttentionMaskInterface.register(implementation_name(variant), sdpa_mask)


def set_attention(model: PreTrainedModel, variant: str) -> PreTrainedModel:
    """Replace the attention normalization of a causal LM in place and note it in its config.

    Args:
        model: a causal LM of a supported family.
        variant: one of `ATTENTION_VARIANTS`.

    Returns:
        The same model.

    Raises:
        SparqError: the family or the variant is not supported, or the config names another variant already.
    """
    variant = check_variant(variant)
    family_of(model)
    saved = getattr(model.config, CONFIG_KEY, None)
    if saved not in (None, variant):
        raise SparqError(f"this model was adapted with attention {saved!r}, not {variant!r}: load it as {saved!r}")
    register_attention()
    model.set_attn_implementation(implementation_name(variant))
    setattr(model.config, CONFIG_KEY, variant)
    return model


@contextlib.contextmanager
def recording_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a model return its probabilities under `output_attentions=True` whatever its family.

    Vanilla attention runs fused, and OPT does not tell the attention function that probabilities are wanted;
    transformers' eager function, the same formula, always returns them.
    """
    name = model.config._attn_implementation
    fused = name in (implementation_name("vanilla"), "sdpa")
    if fused:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if fused:
            model.set_attn_implementation(name)
