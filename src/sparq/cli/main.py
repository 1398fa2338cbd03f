"""The `sparq` command: finds the subcommand, and turns errors into a line and an exit status."""

import argparse
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from sparq.cli import (
    apply,
    bench,
    convert,
    demo,
    doctor,
    export,
    outliers,
    paper,
    pipeline,
    pretrained,
    quantize,
    score,
    speech,
)
from sparq.cli.arguments import Parser, VersionAction
from sparq.errors import SparqError, unknown

_GROUPS = (
    pipeline, demo, apply, speech, score, quantize, outliers, doctor, convert, export, bench, paper, pretrained,
)  # fmt: skip

OK, MISTAKE, INTERRUPTED, BROKEN_PIPE = 0, 2, 128 + 2, 128 + 13
"""Exit statuses; the last two are what a shell reports for SIGINT and SIGPIPE."""

_SURROUNDINGS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.EMFILE,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: the arguments; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _log_lines():
            arguments = _parse(argv)
            # A command that judges returns a status; all others return nothing.
            status: int | None = arguments.handler(arguments)
            sys.stdout.flush()
    except SparqError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would fail again and show.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except MemoryError:
        return _fail("out of memory; what is finished is kept: make batches smaller or close other programs")
    except OSError as error:
        if error.errno not in _SURROUNDINGS:  # anything else is our bug: its traceback is wanted
            raise
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror}{place}; what is finished is kept, so run the same command again")
    return status or OK


def build_parser() -> Parser:
    """Return the parser of all subcommands."""
    parser = Parser(
        prog="sparq",
        description="Turn a pretrained text LLM into an outlier-free SpeechLM, and see what low-bit "
        "quantization does to it. Without recordings of your own, start with `sparq demo`.",
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=Parser)
    for group in _GROUPS:
        group.add_commands(commands)
    parser.set_defaults(parser=parser, commands=commands.choices)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    # Commands and options are checked here first: argparse would list all commands instead of the nearest,
    # and for a misspelled option it would say that the right one is missing.
    level, rest = parser, argv
    while commands := level.get_default("commands"):
        place = next((index for index, text in enumerate(rest) if not text.startswith("-")), len(rest))
        level.check_options(rest[:place])
        if place == len(rest):
            break
        if rest[place] not in commands:
            raise unknown("command", rest[place], commands)
        level, rest = commands[rest[place]], rest[place + 1 :]
    else:
        level.check_options(rest)
    return parser.parse_strictly(argv)


def _fail(message: str) -> int:
    print("sparq: error: " + " ".join(message.split("\n")), file=sys.stderr)
    return MISTAKE


@contextlib.contextmanager
def _log_lines() -> Iterator[None]:
    """Show what the steps say on standard error, for as long as the command runs."""
    logger = logging.getLogger("sparq")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Where it is installed, PEFT imports it; on some CPUs it then asks for a package that sparq has no use for.
    other = logging.getLogger("bitsandbytes")
    other_level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        other.setLevel(other_level)
