"""`sparq export`: a quantized model for readers other than sparq."""

import argparse
from pathlib import Path
from typing import Any

from sparq.errors import SparqError


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "export",
        help="write a quantized model as compressed-tensors, which transformers loads",
        description="Write a quantized model in the format compressed-tensors, which transformers and vLLM load "
        "without sparq. A model that they would not compute alike is refused, with the reason.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder that save_quantized wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    parser.set_defaults(handler=export_model, parser=parser)


def export_model(arguments: argparse.Namespace) -> None:
    """Load, then write."""
    if not (arguments.model / "quantization.json").is_file():
        raise SparqError(f"{arguments.model} has no quantization.json: expected a folder that save_quantized wrote")
    if arguments.out.exists():
        raise SparqError(f"{arguments.out} exists: choose a folder that does not, nothing is overwritten")
    from sparq.quantization import export_compressed_tensors, load_quantized

    export_compressed_tensors(load_quantized(arguments.model), arguments.out)
    print(arguments.out)
