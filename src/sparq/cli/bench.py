"""`sparq bench`: speed, as ratios measured in turn in one process."""

import argparse
from typing import TYPE_CHECKING, Any

from sparq.cli.arguments import positive
from sparq.errors import SparqError, unknown

if TYPE_CHECKING:
    from sparq.bench import Measured

_DTYPES = ("float32", "bfloat16", "float16")
_PASSES = ("forward", "forward+backward", "decode")
_LENGTHS = (512, 1024, 2048, 4096, 8192)


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="compare the speed of attentions with PyTorch's own",
        description="Compare attentions with scaled_dot_product_attention: one layer, the same inputs, run in turn in "
        "one process. Prints Markdown: time and peak memory by the baseline's, median and quartiles over rounds.",
    )
    parser.add_argument("what", metavar="attention", choices=["attention"], help="what to compare: attention")
    parser.add_argument("--dtypes", metavar="NAME", nargs="+", default=["float32", "bfloat16"], help="types")
    parser.add_argument("--passes", metavar="NAME", nargs="+", default=list(_PASSES), help="what is run")
    parser.add_argument(
        "--lengths", metavar="N", nargs="+", type=positive, default=list(_LENGTHS), help="sequence lengths"
    )
    parser.add_argument(
        "--variants", metavar="NAME", nargs="+", default=[], help="attentions (default: all that have a fast path)"
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=9, help="how often each runs, 3 or more")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, or cuda")
    parser.set_defaults(handler=bench, parser=parser)


def bench(arguments: argparse.Namespace) -> None:
    """Print a table."""
    if arguments.rounds < 3:
        raise SparqError(f"--rounds is {arguments.rounds}: quartiles need at least 3")
    for name in arguments.dtypes:
        if name not in _DTYPES:
            raise unknown("dtype", name, _DTYPES)
    for name in arguments.passes:
        if name not in _PASSES:
            raise unknown("pass", name, _PASSES)
    import torch

    from sparq.attention import AttentionSpec
    from sparq.bench import bench_attention, default_cases

    for name in arguments.variants:
        AttentionSpec.parse(name)
    if arguments.device not in ("cpu", "cuda"):
        raise unknown("device", arguments.device, ("cpu", "cuda"))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SparqError("--device is cuda, but PyTorch sees no CUDA device here: use cpu")
    device = torch.device(arguments.device)
    print(_machine(device))
    print("\n| dtype | pass | length | attention | time | quartiles | ms | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    cases = default_cases(dtypes, arguments.lengths, arguments.passes)
    for row in bench_attention(cases, rounds=arguments.rounds, device=device, variants=arguments.variants):
        print(_row(row), flush=True)


def _row(row: "Measured") -> str:
    memory = "" if row.memory is None else f"{row.memory:.2f}"
    name = str(row.case.dtype).removeprefix("torch.")
    return (
        f"| {name} | {row.case.kind} | {row.case.length} | `{row.variant}` | {row.time.median:.3f} | "
        f"{row.time.low:.3f} to {row.time.high:.3f} | {1000 * row.time.seconds:.2f} | {memory} |"
    )


def _machine(device: Any) -> str:
    import torch

    from sparq.report.provenance import collect_provenance

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    found = collect_provenance()
    return f"{found.cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
