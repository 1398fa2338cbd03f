"""A second device on a machine without one: it computes on the CPU, and takes no tensors of the CPU.

What a GPU refuses, `DEVICE` refuses: an operation on tensors of both devices, but for single numbers. Kernels that a
GPU has of its own are slow stand-ins with its conditions. To import this changes PyTorch for the whole process, so its
checks run in one of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_ON_EITHER = ("index", "index_put_", "index_put")  # an index may lie on the CPU, as it may for a GPU
_OF_STORAGE = (Tensor.tolist, Tensor.untyped_storage, Tensor.data_ptr)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, _: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: object = None) -> None:
        torch.set_rng_state(state)


class SecondTensor(Tensor):
    """A tensor of the second device, which holds one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SecondTensor":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"SecondTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class SecondDevice(TorchFunctionMode):
    """What PyTorch does for a tensor below its dispatcher, where a device written in Python has no say."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OF_STORAGE and isinstance(args[0], SecondTensor):
            return func(args[0].inner)
        if func is Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.eye) and "device" in kwargs:
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU; its results are on the second device unless it is told otherwise."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    own = [x for x in tensors if isinstance(x, SecondTensor)]
    others = [x for x in tensors if not isinstance(x, SecondTensor) and x.dim() > 0]
    name = func.overloadpacket.__name__
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    result = _KERNELS.get(name, func)(*plain_args, **plain_kwargs)
    if name in ("copy_", "_copy_from"):
        return args[0]
    # Inference mode has `to` whole.
    moved_to = [x.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
    if name in ("_to_copy", "to") and moved_to and moved_to[0] != DEVICE.type:
        return result
    if own and others and name not in (*_ON_EITHER, "_to_copy", "to"):
        raise RuntimeError(
            f"{func} has tensors on {DEVICE} and on the CPU, those of shape {[tuple(x.shape) for x in others]}"
        )
    # In place an operation returns the tensor that it was given.
    held = {id(x.inner): x for x in own}
    return tree_map_only(Tensor, lambda x: held[id(x)] if id(x) in held else SecondTensor(x), result)


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """As on CUDA: exact, for sizes that cuBLASLt takes, the right side column after column in memory."""
    assert len(left) > 16
    assert left.is_contiguous()
    assert right.t().is_contiguous()
    assert left.shape[1] % 8 == right.shape[1] % 8 == 0
    return (left.double() @ right.double()).int()


def _convert_weight_to_int4pack(pairs: Tensor, tiles: int) -> Tensor:
    """As on CUDA: its type and shape, in an order of its own."""
    rows, half = pairs.shape
    assert pairs.dtype == torch.uint8
    assert tiles in (2, 4, 8)
    assert rows % 8 == (2 * half) % (16 * tiles) == 0
    return pairs.contiguous().view(torch.int32).reshape(rows // 8, 2 * half // (16 * tiles), 32, tiles // 2)


def _weight_int4pack_mm(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """As on CUDA: weights (field - 8) scale + zero, the left of two in the high half of a byte."""
    rows, columns = 8 * packed.shape[0], 8 * packed.numel() // (8 * packed.shape[0])
    assert x.dtype == scales_and_zeros.dtype == torch.bfloat16
    assert scales_and_zeros.shape == (columns // group, rows, 2)
    pairs = packed.reshape(rows, -1).view(torch.uint8)
    fields = torch.stack((pairs >> 4, pairs & 15), -1).view(rows, columns // group, group)
    scale, zero = scales_and_zeros.float().transpose(0, 1).unbind(-1)
    weight = ((fields.float() - 8) * scale[..., None] + zero[..., None]).view(rows, columns)
    return (x.float() @ weight.t()).bfloat16()


_KERNELS: dict[str, Callable[..., Any]] = {
    "_int_mm": _int_mm,
    "_convert_weight_to_int4pack": _convert_weight_to_int4pack,
    "_weight_int4pack_mm": _weight_int4pack_mm,
}
"""What a GPU has of its own, with its conditions on sizes and types."""


def _inner(x: Any) -> Any:
    if isinstance(x, SecondTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == DEVICE.type else x


backend_registration._setup_privateuseone_for_python_backend("second", backend_module=_Module())
DEVICE = torch.device("second:0")
# Modules that share a parameter share it after `to` as well.
torch.__future__.set_swap_module_params_on_conversion(True)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
