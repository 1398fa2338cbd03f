"""`sparq demo`: the main job on the embedded corpus."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.pipeline import print_results


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="run the whole job on the embedded corpus and print the table",
        description="Run the whole job, from recordings to the report, on the corpus of the package.",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("demo-out"), help="the folder to work in")
    parser.add_argument("--retrain", action="store_true", help="train all adapters from nothing; takes hours")
    parser.add_argument("--quick", action="store_true", help="do everything at a tiny size, as a check")
    parser.set_defaults(handler=run_demo, parser=parser)


def run_demo(arguments: argparse.Namespace) -> None:
    """Run the demo."""
    from sparq.recipes.demo import demo

    print_results(demo(out=arguments.out, retrain=arguments.retrain, quick=arguments.quick))
