"""`sparq speak`, `sparq resynthesize` and `sparq vocoder`: sound out."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.apply import check_model, check_recordings, print_spoken
from sparq.cli.arguments import add_dtype, add_model, add_vocoder, positive


def add_commands(commands: Any) -> None:
    """Add the subcommands."""
    parser = commands.add_parser(
        "speak",
        help="speak a text with a trained model",
        description="Speak a text: the model writes units, and a vocoder makes sound of them.",
    )
    parser.add_argument("text", metavar="TEXT", help="what to say")
    add_model(parser)
    parser.add_argument("--out", metavar="FILE.wav", type=Path, required=True, help="the file to write; a new one")
    add_vocoder(parser, "the vocoder's own")
    add_dtype(parser)
    parser.add_argument("--max-new", metavar="N", type=positive, default=300, help="most pieces that the model writes")
    parser.set_defaults(handler=speak_text, parser=parser)

    parser = commands.add_parser(
        "resynthesize",
        help="turn recordings into units and back into sound",
        description="Turn recordings into units and back into sound, to hear what the units keep.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="recordings")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write NAME.wav into")
    add_vocoder(parser, "each recording's own")
    parser.set_defaults(handler=resynthesize, parser=parser)

    parser = commands.add_parser(
        "vocoder",
        help="train a vocoder on a run's recordings and units",
        description="Train a vocoder on the recordings and units of a run; the same command goes on with it.",
    )
    parser.add_argument("action", choices=("train",), help="what to do")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder with manifest and units")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to work in")
    parser.add_argument(
        "--recipe", metavar="FILE.yaml", type=Path, help="the vocoder's recipe (default: every key's own default)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a setting, for example train.updates=10; repeatable (default: the recipe as it is)",
    )
    parser.add_argument(
        "--start", metavar="DIR", type=Path, help="a vocoder to start the weights from (default: random weights)"
    )
    parser.add_argument(
        "--minutes", metavar="N", type=positive, help="stop after so long, to be gone on with (default: no limit)"
    )
    parser.set_defaults(handler=train, parser=parser)


def speak_text(arguments: argparse.Namespace) -> None:
    """Write the sound of a text."""
    check_model(arguments.model)
    from sparq.recipes.speech_out import speak

    spoken = speak(
        model=arguments.model, text=arguments.text, out=arguments.out, vocoder=arguments.vocoder,
        voice=arguments.voice, precision=arguments.precision, dtype=arguments.dtype, max_new=arguments.max_new,
    )  # fmt: skip
    print_spoken(spoken)


def resynthesize(arguments: argparse.Namespace) -> None:
    """Write a file for each recording."""
    check_recordings(arguments.files)
    from sparq.recipes.speech_out import resynthesize_files

    for spoken in resynthesize_files(
        sources=arguments.files, out=arguments.out, vocoder=arguments.vocoder, voice=arguments.voice
    ):
        print_spoken(spoken)


def train(arguments: argparse.Namespace) -> None:
    """Train a vocoder and say where it is."""
    from sparq.recipes.run_folder import RunFolder
    from sparq.recipes.train_together import is_follower, leave
    from sparq.recipes.vocoder import load_vocoder_recipe, train_vocoder

    try:
        vocoder = train_vocoder(
            load_vocoder_recipe(arguments.recipe, arguments.overrides),
            run=RunFolder(arguments.run),
            out=arguments.out,
            start=arguments.start,
            seconds=None if arguments.minutes is None else 60.0 * arguments.minutes,
        )
    finally:
        leave()
    if not is_follower():
        training = vocoder.description.training
        print(f"{vocoder.folder}: {training['updates']} of {training['settings']['updates']} updates")
