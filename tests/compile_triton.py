"""Compiles the Triton kernels for GPUs, without one; prints capability, name, shared memory and bytes of code."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from sparq.attention import triton_kernels
from sparq.attention.triton_max_shift import FORWARD, KEY_GRADIENT, QUERY_GRADIENT, Blocks

STATISTICS = {"row_max": "*fp32", "log_total": "*fp32", "delta": "*fp32", "argmax": "*i32", "mask": "*u8"}


def compile_kernel(kernel: Any, blocks: Blocks, capability: int, *, single: bool) -> tuple[int, int]:
    """Compile for bfloat16, heads of 128 and a boolean mask, as a launch does with well aligned tensors."""
    options = blocks.options()
    constants = {
        "HEAD_DIM": 128, "WIDTH": 128, "IS_CAUSAL": False, "MASK": triton_kernels.BOOLEAN_MASK.value,
        "ROWS": options.pop("ROWS"), "COLUMNS": options.pop("COLUMNS"),
    }  # fmt: skip
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], int] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            if name == "mask_strides":
                signature[name], values[(place, 3)] = (*signature[name], "constexpr"), 1
            aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(3)}
        elif name == "sizes":
            # One head for one key head: Triton takes a 1 for a constant.
            signature[name] = ("constexpr", "constexpr", "i32", "i32") if single else ("i32",) * 4
            values |= {(place, i): 1 for i in range(2) if single}
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name], aligned[(place,)] = STATISTICS.get(name, "*bf16"), [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.metadata.shared, len(compiled.asm["cubin"])


for capability, single in ((80, False), (90, True)):
    for kernel, blocks in (
        (triton_kernels.forward_kernel, FORWARD),
        (triton_kernels.query_gradient_kernel, QUERY_GRADIENT),
        (triton_kernels.key_gradient_kernel, KEY_GRADIENT),
    ):
        print(capability, kernel.__name__, *compile_kernel(kernel, blocks[2], capability, single=single))
