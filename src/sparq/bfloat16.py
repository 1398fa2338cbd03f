"""Products of bfloat16 numbers on processors without instructions for them, AVX2 machines among others.

PyTorch multiplies them there by plain loops: backward passes of SmolLM2-135M took 30 times as long as in float32. Here
each product is one of float32 copies, rounded at the end, which is what processors with such instructions compute, but
for the order of the sums.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
_PRODUCTS = frozenset({
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
    _ATEN.convolution.default, _ATEN.convolution_backward.default,
    _ATEN.addmm_.default,
    _ATEN.linear.default, _ATEN.matmul.default, _ATEN.conv1d.default,  # whole in inference mode only
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,  # the forward pass is as fast as in float32
})  # fmt: skip

_IN_PLACE = frozenset({_ATEN.addmm_.default})
"""Those of them that are added to their first argument."""

_WORTH = 200_000
"""With fewer weights, plain loops end sooner than Python has looked at every operation."""


def is_native(device: torch.device) -> bool:
    """Return whether PyTorch has fast products of bfloat16 there: on a CPU with AVX-512 or Arm's BF16, on any GPU."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_products(
    device: torch.device, dtype: torch.dtype, model: nn.Module | None = None
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products of bfloat16 are fast on the CPU, with their backward passes.

    It changes nothing on other devices, for other types, nor where products of bfloat16 are native. Elsewhere it costs
    some 10 microseconds an operation, so it belongs around work on many tokens, and very small models do without it.

    Args:
        device: where products are made.
        dtype: what is multiplied.
        model: by whose weights; None stands for a large one.
    """
    wanted = dtype == torch.bfloat16 and not is_native(device)
    if not wanted or (model is not None and sum(p.numel() for p in model.parameters()) < _WORTH):
        return contextlib.nullcontext()
    return Float32Products()  # type: ignore[no-untyped-call]


class Float32Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes products of bfloat16 tensors on the CPU as those of float32 copies, and rounds the results."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call one operation."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(_is_narrow(x) for x in args):
            return func(*args, **kwargs)
        result = func(*tree_map_only(Tensor, _widened, args), **kwargs)
        if func in _IN_PLACE:
            return args[0].copy_(result)
        return tree_map_only(Tensor, lambda x: x.to(torch.bfloat16), result)


def _is_narrow(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _widened(x: Tensor) -> Tensor:
    return x.float() if _is_narrow(x) else x
