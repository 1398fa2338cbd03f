"""Watch a forward pass layer by layer: block outputs and attention probabilities, one at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.errors import SparqError
from sparq.models.conversion import recording_attention
from sparq.models.families import decoder_blocks, family_of

OnHidden = Callable[[int, Float[Tensor, "batch length hidden"]], None]
OnAttention = Callable[[int, Float[Tensor, "batch heads queries keys"]], None]
OnFinalNorm = Callable[[Float[Tensor, "batch length hidden"]], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def final_norm_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm behind the last block, or None where there is none (post-norm OPT-350m)."""
    decoder = model.get_submodule(family_of(model).blocks.rpartition(".")[0])
    norms = [module for name, module in decoder.named_children() if name.endswith("norm")]
    assert len(norms) <= 1, "a decoder has one final norm at most"
    return norms[0] if norms else None


def observe(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Shaped[Tensor, "batch length"],
    *,
    on_hidden: OnHidden | None = None,
    on_attention: OnAttention | None = None,
    on_final_norm: OnFinalNorm | None = None,
) -> None:
    """Run the model once and hand over what each layer computes, as soon as it is there.

    Nothing is kept: a block's probabilities are dropped when its callback returns, so one layer's are alive
    at a time, where `outputs.attentions` would hold those of all layers. Positions count real tokens only, so
    left padding leaves the values of the real tokens as they are without padding.

    Args:
        model: a causal LM of a supported family; dropout is off during the pass.
        input_ids: token ids, padded on either side.
        attention_mask: nonzero for a real token, 0 for padding.
        on_hidden: called with the index and the output of each decoder block.
        on_attention: called with the index and the attention probabilities of each block. A row (one query)
            sums to 1, or to less for `softmax1` and `max_shift`.
        on_final_norm: called with the output of the final norm, if the model has one.

    Raises:
        SparqError: probabilities are asked for, and the attention implementation is one that returns none
            and that is not known to equal the eager one.
    """

    def hidden_hook(index: int, on_hidden: OnHidden) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            on_hidden(index, output[0] if isinstance(output, tuple) else output)

        return hook

    def attention_hook(index: int, on_attention: OnAttention) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            mixed, probabilities, *rest = output
            if probabilities is None or probabilities.ndim != 4:  # FlexAttention returns log-sums there
                raise SparqError(
                    f"attention {model.config._attn_implementation!r} returns no probabilities: "
                    "call model.set_attn_implementation('eager') first"
                )
            on_attention(index, probabilities)
            return (mixed, None, *rest)

        return hook

    mask = attention_mask.to(model.device, torch.long).ne(0).long()
    inputs: dict[str, Any] = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }
    if on_attention is not None:
        inputs["output_attentions"] = True

    family = family_of(model)
    final_norm = final_norm_of(model)
    with ExitStack() as stack:
        for index, block in enumerate(decoder_blocks(model)):
            if on_hidden is not None:
                stack.enter_context(_hooked(block, hidden_hook(index, on_hidden)))
            if on_attention is not None:
                attention = block.get_submodule(family.attention)
                # before transformers' own collector, which then finds nothing to keep
                stack.enter_context(_hooked(attention, attention_hook(index, on_attention), prepend=True))
        if on_final_norm is not None and final_norm is not None:
            call = on_final_norm
            stack.enter_context(_hooked(final_norm, lambda _module, _args, output: call(output)))
        if on_attention is not None:
            stack.enter_context(recording_attention(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        model(**inputs, use_cache=False, logits_to_keep=1)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> Iterator[None]:
    handle = module.register_forward_hook(hook, prepend=prepend)
    try:
        yield
    finally:
        handle.remove()
