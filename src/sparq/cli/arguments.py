"""The parser that all subcommands share: defaults in the help, errors in one line."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparq.errors import SparqError, near_matches


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each option's help; an option without one says in its own text what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.help is None or "(default" in action.help:
            return action.help
        if isinstance(action.default, bool):
            return f"{action.help} (default: {'yes' if action.default else 'no'})"
        if isinstance(action, argparse._HelpAction | VersionAction) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `SparqError`s, so that they look like all other errors."""

    def __init__(self, **options: Any) -> None:
        # Without allow_abbrev=False, `--over` would quietly mean --overwrite until another option begins so.
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise SparqError(f"{message} (see `{self.prog} --help`)")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, and let none be left over.

        Raises:
            SparqError: the arguments are wrong.
        """
        arguments, rest = self.parse_known_args(argv)
        if rest:
            parser: Parser = arguments.parser
            parser.error(f"unexpected argument {rest[0]!r}: this command takes no more")
        return arguments

    def check_options(self, argv: Sequence[str]) -> None:
        """Refuse an unknown long option.

        Raises:
            SparqError: there is one; the message names the nearest options.
        """
        valid = [option for option in self._option_string_actions if option.startswith("--")]
        for text in argv:
            name = text.partition("=")[0]
            if text == "--":  # only positional arguments follow
                return
            # As for argparse, what has a space is a value: no option has one.
            if name.startswith("--") and " " not in name and name not in valid:
                self.error(f"unknown option {name!r}: {near_matches(name, valid)}")


class VersionAction(argparse.Action):
    """Prints the version; looked up only when asked for, because that is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print and exit."""
        import importlib.metadata

        try:
            version = importlib.metadata.version("sparq")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed, run from its source)"
        print(f"{parser.prog} {version}")
        parser.exit(0)


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number, 0 included."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """Read a share above 0, which may be more than the whole."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, such as 0.05 for 5 %")
    return value


def points(text: str) -> float:
    """Read a number of points from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of points, such as 0.5")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and `--set`."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="the recipe")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a setting of the recipe, for example train.updates=10; the value is YAML, and relative "
        "paths start at the recipe's folder; repeatable (default: the recipe as it is)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and its precision."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        required=True,
        help="a trained model: RUN/models/FRAMEWORK of a run",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        type=_precision,
        default="full",
        help="full, or one that the run made, for example w8a8-smoothquant",
    )


def add_vocoder(parser: argparse.ArgumentParser, default_voice: str) -> None:
    """Add the vocoder and the voice."""
    parser.add_argument(
        "--vocoder",
        metavar="DIR",
        type=Path,
        help="a vocoder of the model's units (default: the demo's, which the package carries)",
    )
    parser.add_argument(
        "--voice",
        metavar="FILE",
        type=Path,
        help=f"a recording of the voice to speak with (default: {default_voice})",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the type that a model speaks in."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="what the model computes in at full precision (default: bfloat16 on CPUs that have products of it, else"
        " float32; each is the faster one there)",
    )


def _precision(text: str) -> str:
    from sparq.recipes.model_sections import check_scheme

    if text != "full":
        try:
            check_scheme("it", text)
        except SparqError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text
