"""`sparq bench`: speed, as ratios measured in turn in one process."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparq.cli.arguments import positive
from sparq.errors import SparqError, unknown

if TYPE_CHECKING:
    from sparq.bench import Ratio

_DTYPES = ("float32", "bfloat16", "float16")
_PASSES = ("forward", "forward+backward", "decode")
_WORK = ("decode", "prefill")
_CASES = ("lora", "full")
_LENGTHS = (512, 1024, 2048, 4096, 8192)


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("bench", help="compare the speed of attentions, or of precisions", description=__doc__)
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    parser.set_defaults(commands=kinds.choices)
    _add_attention(kinds)
    _add_quantization(kinds)
    _add_training(kinds)


def _add_attention(kinds: Any) -> None:
    parser = kinds.add_parser(
        "attention",
        help="attentions against PyTorch's own",
        description="Compare attentions with scaled_dot_product_attention: one layer, the same inputs, run in turn in "
        "one process. Prints Markdown: time and peak memory by the baseline's, median and quartiles over rounds.",
    )
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
    parser.set_defaults(handler=bench_attentions, parser=parser)


def _add_quantization(kinds: Any) -> None:
    parser = kinds.add_parser(
        "quantization",
        help="a model computing with integers against the same in bfloat16",
        description="Compare precisions of a whole model, run in turn in one process: one token over a "
        "cache, and a prompt. Prints Markdown: time by that of bfloat16, median and quartiles over rounds.",
    )
    parser.add_argument("--model", metavar="MODEL", default="pretrained:smollm2-135m", help="what load_model takes")
    parser.add_argument(
        "--precisions",
        metavar="NAME",
        nargs="+",
        default=[],
        help="float32, or names like w8a8, w4a16-g64, w4a16-g64-e8: bits of weights and activations, size of groups, "
        "bits of embedding and head (default: those of docs/benchmarks.md)",
    )
    parser.add_argument("--length", metavar="N", type=positive, default=256, help="tokens of the prompt and the cache")
    parser.add_argument("--work", metavar="NAME", nargs="+", default=list(_WORK), help="decode, prefill")
    parser.add_argument("--compile", action="store_true", help="run the models by torch.compile (needs a C++ compiler)")
    parser.add_argument("--rounds", metavar="N", type=positive, default=9, help="how often each runs, 3 or more")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, or cuda")
    parser.set_defaults(handler=bench_precisions, parser=parser)


def _add_training(kinds: Any) -> None:
    parser = kinds.add_parser(
        "training",
        help="updates of sparq train against those of transformers' Trainer with PEFT",
        description="Compare updates on the same examples, on a CPU, in bfloat16, run in turn in one process. Prints "
        "Markdown: time by the Trainer's, median and quartiles over rounds.",
    )
    parser.add_argument("--cases", metavar="NAME", nargs="+", default=list(_CASES), help="lora, full")
    parser.add_argument("--model", metavar="MODEL", default="pretrained:smollm2-135m", help="what lora adapts")
    parser.add_argument(
        "--attentions", metavar="NAME", nargs="+", default=["vanilla", "softmax1", "max_shift"], help="of sparq train"
    )
    parser.add_argument("--sequences", metavar="N", type=positive, default=32, help="examples of an update, in eights")
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=2000, help="tokens of a packed row")
    parser.add_argument("--rounds", metavar="N", type=positive, default=5, help="how often each runs, 3 or more")
    parser.set_defaults(handler=bench_trainings, parser=parser)


def bench_trainings(arguments: argparse.Namespace) -> None:
    """Print a table of updates."""
    _check_rounds(arguments.rounds)
    _check_names("case", arguments.cases, _CASES)
    if arguments.sequences % 8:
        raise SparqError(f"--sequences is {arguments.sequences}: the Trainer's batches have 8, so take a multiple of 8")
    from sparq.attention import AttentionSpec
    from sparq.bench import bench_training
    from sparq.devices import compute_device

    for name in arguments.attentions:
        AttentionSpec.parse(name)
    print(_machine(compute_device()))
    _print_header("case", "contender", "speed", "time", "quartiles", "s an update", "tokens/s", "memory, MB")
    rows = bench_training(
        arguments.cases,
        attentions=arguments.attentions,
        backbone=arguments.model,
        sequences=arguments.sequences,
        batch_tokens=arguments.batch_tokens,
        rounds=arguments.rounds,
    )
    for row in rows:
        _print_row(
            row.case, row.contender, f"{1 / row.time.median:.2f}", *_ratio(row.time), f"{row.time.seconds:.2f}",
            f"{row.tokens_per_second:.0f}", _megabytes(row.memory),
        )  # fmt: skip


def bench_precisions(arguments: argparse.Namespace) -> None:
    """Print a table of precisions."""
    _check_rounds(arguments.rounds)
    _check_names("work", arguments.work, _WORK)
    from sparq.bench import bench_quantization
    from sparq.bench.quantization import DEFAULT_PRECISIONS

    device = _device(arguments.device)
    print(_machine(device) + (", compiled" if arguments.compile else ", not compiled"))
    _print_header("work", "precision", "speed", "time", "quartiles", "ms", "weights, MB", "peak of a call, MB")
    rows = bench_quantization(
        arguments.model,
        arguments.precisions or DEFAULT_PRECISIONS,
        length=arguments.length,
        rounds=arguments.rounds,
        compiled=arguments.compile,
        work=arguments.work,
        device=device,
    )
    for row in rows:
        _print_row(
            f"{row.work} {arguments.length}", row.precision, f"{1 / row.time.median:.2f}", *_ratio(row.time),
            f"{1000 * row.time.seconds:.1f}", _megabytes(row.weights), _megabytes(row.peak),
        )  # fmt: skip


def bench_attentions(arguments: argparse.Namespace) -> None:
    """Print a table of attentions."""
    _check_rounds(arguments.rounds)
    _check_names("dtype", arguments.dtypes, _DTYPES)
    _check_names("pass", arguments.passes, _PASSES)
    import torch

    from sparq.attention import AttentionSpec
    from sparq.bench import bench_attention, default_cases

    for name in arguments.variants:
        AttentionSpec.parse(name)
    device = _device(arguments.device)
    print(_machine(device))
    _print_header("dtype", "pass", "length", "attention", "time", "quartiles", "ms", "peak memory")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    cases = default_cases(dtypes, arguments.lengths, arguments.passes)
    for row in bench_attention(cases, rounds=arguments.rounds, device=device, variants=arguments.variants):
        _print_row(
            str(row.case.dtype).removeprefix("torch."), row.case.kind, row.case.length, f"`{row.variant}`",
            *_ratio(row.time), f"{1000 * row.time.seconds:.2f}", "" if row.memory is None else f"{row.memory:.2f}",
        )  # fmt: skip


def _check_rounds(rounds: int) -> None:
    if rounds < 3:
        raise SparqError(f"--rounds is {rounds}: quartiles need at least 3")


def _device(name: str) -> Any:
    import torch

    _check_names("device", [name], ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise SparqError("--device is cuda, but PyTorch sees no CUDA device here: use cpu")
    return torch.device(name)


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


def _print_header(*names: str) -> None:
    print()
    _print_row(*names)
    print(f"|{'---|' * len(names)}")


def _print_row(*cells: object) -> None:
    """Print cells of Markdown at once: a row may take minutes."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _ratio(time: "Ratio") -> tuple[str, str]:
    """Return the cells of a ratio of times: the median, and the quartiles."""
    return f"{time.median:.3f}", f"{time.low:.3f} to {time.high:.3f}"


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _machine(device: Any) -> str:
    import torch

    from sparq.report.provenance import collect_provenance

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    found = collect_provenance()
    return f"{found.cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
