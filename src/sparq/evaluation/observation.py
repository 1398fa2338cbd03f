"""Watch a forward pass layer by layer: outputs of blocks, modules and attention, one at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparq.attention import OutlierFreeAttention
from sparq.evaluation.seen_attention import SeenAttention
from sparq.models.conversion import recording_attention
from sparq.models.families import decoder_blocks, family_of

OnHidden = Callable[[int, Float[Tensor, "batch length hidden"]], None]
OnAttention = Callable[[int, SeenAttention], None]
OnModule = Callable[[str, Float[Tensor, "batch length width"]], None]
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


def parts_of_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear layer and every norm inside the blocks, by full name."""
    family = family_of(model)
    found = {}
    for index, block in enumerate(decoder_blocks(model)):
        for name, module in block.named_modules():
            if name in family.linears or name.endswith("norm"):
                found[f"{family.blocks}.{index}.{name}"] = module
    return found


def observe(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Shaped[Tensor, "batch length"],
    *,
    on_hidden: OnHidden | None = None,
    on_attention: OnAttention | None = None,
    on_module: OnModule | None = None,
    on_final_norm: OnFinalNorm | None = None,
) -> None:
    """Run the model once and hand over what each layer computes, as soon as it is there.

    Nothing is kept: what a callback is given is dropped when it returns, so the probabilities of one layer are alive
    at a time. Positions count real tokens only, so left padding leaves the values of the real tokens as they are
    without padding.

    Args:
        model: a causal LM of a supported family; dropout is off during the pass.
        input_ids: token ids, padded on either side.
        attention_mask: nonzero for a real token, 0 for padding.
        on_hidden: called with the index and the output of each decoder block.
        on_attention: called with the index and the attention of each block.
        on_module: called with the name and the output of each part of the blocks, see `parts_of_blocks`.
        on_final_norm: called with the output of the final norm, if the model has one.

    Raises:
        SparqError: attention is to be watched, and the implementation is not one that can be.
    """

    def hidden_hook(index: int, on_hidden: OnHidden) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            on_hidden(index, output[0] if isinstance(output, tuple) else output)

        return hook

    def attention_hook(index: int, on_attention: OnAttention) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            query, key, value, mask = args
            output, probabilities = result
            on_attention(
                index,
                SeenAttention(
                    query=query, key=key, value=value, mask=mask, scaling=kwargs["scaling"],
                    probabilities=probabilities, output=output,
                ),
            )  # fmt: skip

        return hook

    def module_hook(name: str, on_module: OnModule) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            # OPT runs its MLP on all tokens of a batch in one row, Qwen3 its inner norms on each head.
            on_module(name, output.reshape(*input_ids.shape, -1))

        return hook

    mask = attention_mask.to(model.device, torch.long).ne(0).long()
    final_norm = final_norm_of(model)
    with ExitStack() as stack:
        if on_hidden is not None:
            for index, block in enumerate(decoder_blocks(model)):
                stack.callback(block.register_forward_hook(hidden_hook(index, on_hidden)).remove)
        if on_module is not None:
            for name, module in parts_of_blocks(model).items():
                stack.callback(module.register_forward_hook(module_hook(name, on_module)).remove)
        if on_final_norm is not None and final_norm is not None:
            call = on_final_norm
            stack.callback(final_norm.register_forward_hook(lambda _module, _args, output: call(output)).remove)
        if on_attention is not None:
            layers: list[OutlierFreeAttention] = stack.enter_context(recording_attention(model))
            for index, layer in enumerate(layers):
                hook = attention_hook(index, on_attention)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        model(
            input_ids=input_ids.to(model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
