"""`sparq transcribe` and `sparq continue`: use a trained model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparq.cli.arguments import add_model, add_vocoder, positive
from sparq.errors import SparqError

if TYPE_CHECKING:
    from sparq.recipes.speech_out import Spoken


def add_commands(commands: Any) -> None:
    """Add the subcommands."""
    parser = commands.add_parser(
        "transcribe",
        help="turn recordings into text with a trained model",
        description="Turn recordings into text: a line for each, the file and its text with a tab between.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="recordings")
    add_model(parser)
    parser.set_defaults(handler=transcribe_files, parser=parser)

    parser = commands.add_parser(
        "continue",
        help="continue a text, or speech as units, with a trained model",
        description="Continue a text, or a recording, and print the continuation; speech as units, or with --out as"
        " sound.",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--text", metavar="TEXT", help="text to continue (default: none, then --audio is needed)")
    prompt.add_argument(
        "--audio",
        metavar="FILE",
        type=Path,
        help="recording to continue (default: none, then --text is needed)",
    )
    add_model(parser)
    parser.add_argument("--max-new", metavar="N", type=positive, default=50, help="most new pieces")
    parser.add_argument(
        "--out",
        metavar="FILE.wav",
        type=Path,
        help="with --audio, write the continuation as sound, a new file (default: print its units)",
    )
    add_vocoder(parser, "that of the recording")
    parser.set_defaults(handler=continue_prompt, parser=parser)


def transcribe_files(arguments: argparse.Namespace) -> None:
    """Print a transcript for each file."""
    check_model(arguments.model)
    check_recordings(arguments.files)
    from sparq.recipes.apply import transcribe

    transcripts = transcribe(model=arguments.model, files=arguments.files, precision=arguments.precision)
    for transcript in transcripts:
        print(f"{transcript.path}\t{transcript.text}")


def continue_prompt(arguments: argparse.Namespace) -> None:
    """Print the continuation of a text or a recording."""
    check_model(arguments.model)
    if arguments.audio is not None:
        check_recordings([arguments.audio])
    for option in ("out", "vocoder", "voice"):
        if getattr(arguments, option) is not None and (arguments.audio is None or arguments.out is None):
            raise SparqError(f"--{option} is for sound: give --audio and --out with it")
    from sparq.recipes.apply import continue_audio, continue_text

    options: dict[str, Any] = {"model": arguments.model, "precision": arguments.precision, "max_new": arguments.max_new}
    if arguments.out is not None:
        from sparq.recipes.speech_out import continue_speech

        options |= {"vocoder": arguments.vocoder, "voice": arguments.voice}
        print_spoken(continue_speech(file=arguments.audio, out=arguments.out, **options))
    elif arguments.audio is not None:
        print(continue_audio(file=arguments.audio, **options))
    else:
        print(continue_text(text=arguments.text, **options))


def check_model(folder: Path) -> None:
    """Check that the folder is there, before the slow imports."""
    if not folder.is_dir():
        raise SparqError(f"no model folder {folder}: --model expects RUN/models/FRAMEWORK of a finished run")


def check_recordings(files: list[Path]) -> None:
    """Check that the files are there, before the slow imports."""
    for file in files:
        if not file.exists():
            raise SparqError(f"no such file: {file}")
        if file.is_dir():
            raise SparqError(f"{file} is a folder: expected a recording")


def print_spoken(spoken: "Spoken") -> None:
    """Print the file and how long it took."""
    print(
        f"{spoken.path}: {spoken.seconds:.2f} s of speech in {spoken.made:.2f} s, the first of it after"
        f" {spoken.first_audio:.2f} s"
    )
