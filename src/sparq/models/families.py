"""What differs between the supported model families, as data: where the blocks, linear layers and norms are."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sparq.errors import SparqError


@dataclass(frozen=True, kw_only=True)
class NormGroup:
    """A norm and the linear layers that read its output and nothing else (names relative to one block)."""

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The layout of one `config.model_type`.

    Attributes:
        model_type: transformers' name of the family.
        blocks: path of the list of decoder blocks, from the causal LM.
        attention: path of the attention module, from a block.
        linears: every linear layer of a block, in the order of evaluation.
        norm_groups: norms whose output feeds linear layers directly, in a pre-norm block.
        embeddings: paths of the tables that the first block's input is the sum of, from the causal LM.
        final_norm: path of the norm before the head, from the causal LM.
        value: the layer that makes the values, among others if `fused`.
        output: the layer that reads the heads' outputs.
        down: the last layer of the MLP.
        fused: whether `value` makes queries, keys and values, one after another for each head.
        lora_targets: the layers that the papers adapt (q, k, v, o and the MLP; SpARQ appendix E.1).
    """

    model_type: str
    blocks: str
    attention: str
    linears: tuple[str, ...]
    norm_groups: tuple[NormGroup, ...]
    embeddings: tuple[str, ...]
    final_norm: str
    value: str
    output: str
    down: str
    lora_targets: tuple[str, ...]
    fused: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = Family(
    model_type="llama",
    blocks="model.layers",
    attention="self_attn",
    linears=(*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norm_groups=(
        NormGroup(norm="input_layernorm", linears=_QKV),
        NormGroup(norm="post_attention_layernorm", linears=("mlp.gate_proj", "mlp.up_proj")),
    ),
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    down="mlp.down_proj",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)

_OPT = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    attention="self_attn",
    linears=(*_QKV, "self_attn.out_proj", "fc1", "fc2"),
    norm_groups=(
        NormGroup(norm="self_attn_layer_norm", linears=_QKV),
        NormGroup(norm="final_layer_norm", linears=("fc1",)),
    ),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    down="fc2",
    lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)

# Their blocks are Llama's, as far as anything here can see: Qwen2 has biases, Qwen3 norms between projections and
# rotation, Mistral a sliding window.
_MISTRAL, _QWEN2, _QWEN3 = (dataclasses.replace(_LLAMA, model_type=name) for name in ("mistral", "qwen2", "qwen3"))

_GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    attention="attention",
    linears=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    norm_groups=(
        NormGroup(norm="input_layernorm", linears=("attention.query_key_value",)),
        NormGroup(norm="post_attention_layernorm", linears=("mlp.dense_h_to_4h",)),
    ),
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    value="attention.query_key_value",
    output="attention.dense",
    down="mlp.dense_4h_to_h",
    fused=True,
    lora_targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (_LLAMA, _OPT, _MISTRAL, _QWEN2, _QWEN3, _GPT_NEOX)
}


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a causal LM.

    Raises:
        SparqError: the family is not supported; the message lists those that are.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise SparqError(f"model family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder blocks of a causal LM."""
    blocks = model.get_submodule(family_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def is_pre_norm(model: PreTrainedModel) -> bool:
    """Tell whether norms stand before the sublayers; OPT-350m's stand after, so nothing can be folded into them."""
    return bool(getattr(model.config, "do_layer_norm_before", True))


def named_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full name and module of every linear layer inside the blocks (not the head, not projections)."""
    family = family_of(model)
    for index, block in enumerate(decoder_blocks(model)):
        for name in family.linears:
            yield f"{family.blocks}.{index}.{name}", block.get_submodule(name)


def input_groups(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Return the names, from a block, of the linear layers that read one input together, in the order of evaluation."""
    family = family_of(model)
    shared = {name: group.linears for group in family.norm_groups for name in group.linears}
    return list(dict.fromkeys(shared.get(name, (name,)) for name in family.linears))


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of every block."""
    family = family_of(model)
    return [block.get_submodule(family.attention) for block in decoder_blocks(model)]
