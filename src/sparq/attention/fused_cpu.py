"""PyTorch's flash kernel of the CPU."""

from dataclasses import dataclass

import torch
from packaging.version import Version

from sparq.attention.fused_kernel import Bias, Keys, Queries, Rows, State


@dataclass(frozen=True, kw_only=True)
class CpuKernel:
    """`aten._scaled_dot_product_flash_attention_for_cpu`, in any floating type.

    Attributes:
        has_groups: whether the kernel itself shares a key head among query heads.
    """

    has_groups: bool

    def forward(
        self, query: Queries, key: Keys, value: Keys, bias: Bias | None, *, is_causal: bool, scaling: float
    ) -> tuple[Queries, Rows, State]:
        """See `FusedKernel`."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scaling
        )
        return out, lse, (bias,)

    def backward(
        self, grad: Queries, query: Queries, key: Keys, value: Keys, out: Queries, lse: Rows, state: State, *,
        is_causal: bool, scaling: float,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """See `FusedKernel`."""
        gradients: tuple[Queries, Keys, Keys] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=state[0], scale=scaling
        )
        return gradients


CPU = CpuKernel(has_groups=Version(torch.__version__) >= Version("2.13"))
"""The kernel of the PyTorch at hand; whether older ones share key heads was not tried."""
