"""Norms and gated MLPs that keep less for the backward: what a pass over the inputs gives again is not kept."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)


def keep_less(model: nn.Module) -> None:
    """Let the norms and MLPs of Llama, Mistral, Qwen2 and Qwen3 keep less for the backward.

    In 16 bit a number of the stream costs 2 bytes less at each norm that is not trained, and one of an MLP's width 2
    bytes. What the modules compute stays the same to the last bit, and so do their weights and names. Other modules are
    left as they are.

    Args:
        model: changed in place; doing it again changes nothing.
    """
    for module in model.modules():
        kind = _LEAN.get(type(module))
        if kind is not None and (type(module) in _NORMS or isinstance(module.act_fn, nn.SiLU | SiLUActivation)):
            module.__class__ = kind


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        out: Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return out


class _GatedMlp(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        product = _SiluProduct.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        out: Tensor = self.down_proj(product)
        return out


class _RmsNorm(torch.autograd.Function):
    """y = w * (x r) with r = (mean x^2 + epsilon)^-1/2, in float32; x r is rounded to the type of x as theirs is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        # [*batch 1]
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # r (g - n mean(g n)) with g the gradient of n = x r.
            wide = (grad * weight).float()
            shared = (wide * normed).mean(-1, keepdim=True)
            grad_x = wide.sub_(normed.mul_(shared)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up; of the three tensors that autograd would keep, silu(gate) is made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


_LEAN: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Lean{kind.__name__}", (mixin, kind), {})
    for mixin, kinds in ((_Norm, _NORMS), (_GatedMlp, _MLPS))
    for kind in kinds
}
