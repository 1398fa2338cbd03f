"""`sparq outliers`: measure and draw the outliers of any model."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.apply import check_recordings
from sparq.cli.arguments import positive
from sparq.errors import SparqError


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "outliers",
        help="measure and draw the outliers of any model",
        description="Measure the outliers of causal LMs or trained SpeechLMs, print a table, and write a page with "
        "bars (by task, if a SpeechLM is given several), curves by layer, and heat maps of one sample: attention "
        "probability, value and output of the head that looks most at the first token, and the largest activation of "
        "each token and layer. The models stand side by side.",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a folder, a hub name, pretrained:NAME, or RUN/models/FRAMEWORK"
    )
    parser.add_argument(
        "--attention",
        metavar="NAME",
        nargs="+",
        default=[],
        help="run a causal LM under each of these, for example vanilla softmax1 (default: the one that it names)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="text to measure on (default: the demo's prose, unless --audio is given)",
    )
    parser.add_argument(
        "--audio", metavar="FILE", type=Path, nargs="+", default=[], help="recordings, for SpeechLMs (default: none)"
    )
    parser.add_argument(
        "--transcripts",
        metavar="FILE",
        type=Path,
        help="what is said in the recordings, a line each: measures ASR too (default: none)",
    )
    parser.add_argument("--tokens", metavar="N", type=positive, default=2048, help="most tokens of each task")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("outliers.html"), help="the page to write")
    parser.set_defaults(handler=measure, parser=parser)


def measure(arguments: argparse.Namespace) -> None:
    """Print the table and write the page."""
    for file in (arguments.text, arguments.transcripts):
        if file is not None and not file.is_file():
            raise SparqError(f"no such file: {file}")
    if arguments.out.exists() and not _is_ours(arguments.out):
        raise SparqError(f"{arguments.out} exists and is no page of this command: choose another --out")
    check_recordings(arguments.audio)
    from sparq.recipes.inspection import inspect_outliers
    from sparq.report import render_terminal, write_html

    results = inspect_outliers(
        arguments.models,
        attentions=arguments.attention,
        text=arguments.text,
        audio=arguments.audio,
        transcripts=arguments.transcripts,
        tokens=arguments.tokens,
    )
    write_html(arguments.out, results, folder=arguments.out.parent)
    print(render_terminal(results))
    print(f"\n{arguments.out}")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return b"Outliers of " in file.read(2000)
