"""A linear layer with its adapter as one operation, on a CPU, where every pass over an output counts."""

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparq.adaptation.dropout import Dropout, expand, masked


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer W x + c B A drop(x), the low-rank part added by the product that makes it.

    The factor, and that of dropout, go to the `rank` numbers in between instead of the outputs, and the dropped input
    is not kept. In all but the plain case (one adapter, not merged, no variant, everything of one type) it is PEFT's.
    """

    def forward(self, x: Float[Tensor, "*batch inputs"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch outputs"]:
        """Compute the layer."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if name is None or not self._is_plain(name, x) or args or kwargs:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        dropout = self.lora_dropout[name]
        scaling, bits = self.scaling[name], None
        if isinstance(dropout, Dropout) and dropout.training and dropout.p > 0:
            bits, scaling = dropout.draw(x.numel()), scaling * dropout.scale
        base = self.get_base_layer()
        fused: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, bits, scaling
        )
        return fused

    def _is_plain(self, name: str, x: Tensor) -> bool:
        if self.disable_adapters or self.merged or name not in self.lora_A or name in self.lora_variant:
            return False
        base, first, second = self.get_base_layer(), self.lora_A[name], self.lora_B[name]
        return (
            type(base) is nn.Linear
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and second.bias is None
            and isinstance(self.lora_dropout[name], Dropout | nn.Identity)
            and {x.dtype, base.weight.dtype, first.weight.dtype, second.weight.dtype} == {x.dtype}
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
        )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, bits: Tensor | None,
        scaling: float,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        dropped = rows if bits is None else masked(rows, expand(bits, rows))
        # [rows rank]
        inner = (dropped @ first.T).mul_(scaling)
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        out.addmm_(inner, second.T)
        ctx.save_for_backward(rows, weight, first, second, bits, inner)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, first, second, bits, inner = ctx.saved_tensors
        mask = None if bits is None else expand(bits, rows)
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ second).mul_(ctx.scaling)
        grad_second = grad.T @ inner
        grad_first = grad_inner.T @ (rows if mask is None else masked(rows, mask))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if mask is None:
                grad_x.addmm_(grad_inner, first)
            else:
                grad_x += masked(grad_inner @ first, mask)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_first, grad_second, None, None
