"""Tiny random models of every supported family, in the exact layouts."""

import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
_OPT = {**_SHAPE, "ffn_dim": 64, "dropout": 0.0, "bos_token_id": 2, "pad_token_id": 1}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in _GROUPED.items() if k != "head_dim"})),
    # Its heads are together wider than its hidden states.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_GROUPED, "head_dim": 16})),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE, intermediate_size=64)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=True)),
    "opt_350m": lambda: OPTForCausalLM(OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
}


def random_model(family: str) -> PreTrainedModel:
    """Return a model as transformers initializes it."""
    return FAMILIES[family]().eval()


def tiny_model(family: str) -> PreTrainedModel:
    """Return a random model with scores wide enough that the variants differ, always the same one."""
    torch.manual_seed(0)
    model = random_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6.0)
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return what a model says of every next token, without gradients."""
    with torch.no_grad():
        return model(ids).logits
