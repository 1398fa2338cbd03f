"""PyTorch's flash and memory-efficient kernels of NVIDIA GPUs, and which kernel takes what.

| kernel    | types             | compute capability     | masks | head_dim                      | grouped heads |
|-----------|-------------------|------------------------|-------|-------------------------------|---------------|
| flash     | bfloat16, float16 | 8.0                    | no    | a multiple of 8, at most 192  | yes           |
| efficient | and float32       | 7.0, for bfloat16 8.0  | yes   | a multiple of 16 bytes        | repeated      |
| Triton    | all three         | 8.0                    | yes   | at most 128                   | yes           |

The limits are those that PyTorch's own choice observes, or narrower where its limit depends on more: flash has a
backward for a head_dim of 256 on some devices only, and on devices before 8.0 efficient takes odd head_dims in float32.
cuDNN's kernel, which PyTorch prefers on Hopper, is not used: the layout of its log-sum-exp and its limits change with
its version. The Triton kernel is that of `sparq.attention.triton_max_shift`, for `max_shift` alone.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparq.attention.fused_kernel import Bias, FusedKernel, Keys, Queries, Rows, State
from sparq.attention.packed import Documents

Backend = Literal["flash", "efficient"]

_HALF = (torch.bfloat16, torch.float16)
_BIAS_ALIGNMENT = 16
"""Elements of which the rows of a bias must be a multiple, as in PyTorch's own call."""
_LSE_ALIGNMENT = 32
"""Queries of which the efficient kernel's log-sum-exp has a multiple."""


def choose_backend(dtype: torch.dtype, head_dim: int, capability: tuple[int, int], *, masked: bool) -> Backend | None:
    """Return the kernel to use, or None if there is none.

    If there is one with a mask, there is one without.

    Args:
        dtype: of queries, keys and values.
        head_dim: width of a head.
        capability: the device's compute capability, (8, 0) for an A100.
        masked: whether there is a bias.
    """
    if dtype not in (*_HALF, torch.float32) or head_dim * dtype.itemsize % 16 != 0:
        return None
    if capability < ((8, 0) if dtype == torch.bfloat16 else (7, 0)):
        return None
    if dtype in _HALF and capability >= (8, 0) and head_dim <= 192 and not masked:
        return "flash"
    return "efficient"


def triton_fits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> bool:
    """Tell whether the Triton kernel can do it; arguments as in `choose_backend`."""
    return dtype in (*_HALF, torch.float32) and head_dim <= 128 and capability >= (8, 0)


def takes_triton(query: Queries) -> bool:
    """Tell whether `max_shift` of these queries is left to the Triton kernel: they are on CUDA, and Triton is there."""
    if query.device.type != "cuda" or torch.version.hip is not None or not _has_triton():
        return False
    return triton_fits(query.dtype, query.shape[-1], torch.cuda.get_device_capability(query.device))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def cuda_kernel(query: Queries, *, masked: bool) -> FusedKernel | None:
    """Return the kernel for queries on a CUDA device, or None if there is none; ROCm has none."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(query.device)
    backend = choose_backend(query.dtype, query.shape[-1], capability, masked=masked)
    return None if backend is None else KERNELS[backend]


def packed_kernel(query: Queries, documents: Documents) -> FusedKernel | None:
    """Return the flash kernel for packed documents, where queries are on CUDA and it takes them."""
    if query.device.type != "cuda" or not isinstance(cuda_kernel(query, masked=False), FlashKernel):
        return None
    return PackedFlashKernel(documents=documents)


class FlashKernel:
    """`aten._scaled_dot_product_flash_attention` (FlashAttention-2), without masks."""

    has_groups = True

    def forward(
        self, query: Queries, key: Keys, value: Keys, bias: Bias | None, *, is_causal: bool, scaling: float
    ) -> tuple[Queries, Rows, State]:
        """See `FusedKernel`."""
        assert bias is None, "the flash kernel takes no bias"
        # It would align the last query with the last key.
        assert not is_causal or query.shape[2] == key.shape[2], "causal queries are as many as the keys"
        out, lse, starts_q, starts_k, _, _, rng, unused, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scaling
        )
        return out, lse, (starts_q, starts_k, rng, unused)

    def backward(
        self, grad: Queries, query: Queries, key: Keys, value: Keys, out: Queries, lse: Rows, state: State, *,
        is_causal: bool, scaling: float,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """See `FusedKernel`."""
        starts_q, starts_k, rng, unused = state
        gradients: tuple[Queries, Keys, Keys] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse, starts_q, starts_k, query.shape[2], key.shape[2], 0.0, is_causal,
            rng, unused, scale=scaling,
        )  # fmt: skip
        return gradients


@dataclass(frozen=True, kw_only=True)
class PackedFlashKernel:
    """`aten._flash_attention_forward` (FlashAttention-2) over documents in one row, each causal by itself.

    Attributes:
        documents: where they begin.
    """

    documents: Documents
    has_groups = True

    def forward(
        self, query: Queries, key: Keys, value: Keys, bias: Bias | None, *, is_causal: bool, scaling: float
    ) -> tuple[Queries, Rows, State]:
        """See `FusedKernel`."""
        assert bias is None, "the flash kernel takes no bias"
        assert is_causal, "documents are causal"
        # [1 heads tokens head_dim] -> [tokens heads head_dim]
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            *rows, *self._documents, 0.0, True, False, scale=scaling, **self._window
        )
        return out.transpose(0, 1)[None], lse[None], (rng, unused)

    def backward(
        self, grad: Queries, query: Queries, key: Keys, value: Keys, out: Queries, lse: Rows, state: State, *,
        is_causal: bool, scaling: float,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """See `FusedKernel`."""
        rows = (x[0].transpose(0, 1) for x in (grad, query, key, value, out))
        gradients = torch.ops.aten._flash_attention_backward(
            *rows, lse[0], *self._documents, 0.0, is_causal, *state, scale=scaling, **self._window
        )
        grad_query, grad_key, grad_value = (x.transpose(0, 1)[None] for x in gradients)
        return grad_query, grad_key, grad_value

    @property
    def _documents(self) -> tuple[Tensor, Tensor, int, int]:
        starts, longest = self.documents.starts, self.documents.longest
        return starts, starts, longest, longest

    @property
    def _window(self) -> dict[str, int]:
        window = self.documents.window
        return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class EfficientKernel:
    """`aten._scaled_dot_product_efficient_attention` (CUTLASS), with masks."""

    has_groups = False

    def forward(
        self, query: Queries, key: Keys, value: Keys, bias: Bias | None, *, is_causal: bool, scaling: float
    ) -> tuple[Queries, Rows, State]:
        """See `FusedKernel`."""
        bias = None if bias is None else align_bias(bias, query.shape[:3])
        out, lse, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scaling
        )
        return out, lse[..., : query.shape[2]], (bias, seed, offset)

    def backward(
        self, grad: Queries, query: Queries, key: Keys, value: Keys, out: Queries, lse: Rows, state: State, *,
        is_causal: bool, scaling: float,
    ) -> tuple[Queries, Keys, Keys]:  # fmt: skip
        """See `FusedKernel`."""
        bias, seed, offset = state
        grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, bias, out, pad_lse(lse), seed, offset, 0.0, [True, True, True, False],
            is_causal, scale=scaling,
        )  # fmt: skip
        return grad_query, grad_key, grad_value


KERNELS: dict[Backend, FusedKernel] = {"flash": FlashKernel(), "efficient": EfficientKernel()}


def align_bias(bias: Bias, rows: tuple[int, ...]) -> Float[Tensor, "batch heads queries keys"]:
    """Expand a bias to all rows (batch, heads, queries), each beginning where the efficient kernel can load it."""
    if bias.stride(-1) != 1 or any(stride % _BIAS_ALIGNMENT for stride in bias.stride()[:-1]):
        keys = bias.shape[-1]
        wide = bias.new_empty(*bias.shape[:-1], keys + -keys % _BIAS_ALIGNMENT)
        bias = wide[..., :keys].copy_(bias)
    return bias.expand(*rows, bias.shape[-1])


def pad_lse(lse: Rows) -> Float[Tensor, "batch heads padded"]:
    """Pad with inf, as the efficient kernel does, so that rows that are not there have probabilities of 0."""
    return functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=float("inf"))
