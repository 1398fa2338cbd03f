"""`sparq pretrained`: build the cached pretrained models."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "pretrained",
        help="download and build the pretrained models that recipes name pretrained:NAME",
        description="Download and build pretrained models into the cache, check the hashes of all their "
        "files, and print the folders. The cache is $SPARQ_PRETRAINED, or else ~/.cache/sparq/pretrained.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="models, such as smollm2-135m (default: all)")
    parser.set_defaults(handler=build_models, parser=parser)


def build_models(arguments: argparse.Namespace) -> None:
    """Build models that are not there, check all, and print their folders."""
    from sparq.errors import unknown
    from sparq.pretrained import PRETRAINED_NAMES, pretrained_folder

    for name in arguments.names:  # all names before the first download
        if name not in PRETRAINED_NAMES:
            raise unknown("pretrained model", name, PRETRAINED_NAMES)
    for name in arguments.names or PRETRAINED_NAMES:
        print(f"{name}\t{pretrained_folder(name, verify=True)}")
