"""`sparq score`: zero-resource scores of a trained SpeechLM."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.apply import check_model, check_recordings
from sparq.cli.arguments import add_model, positive, whole
from sparq.errors import SparqError


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "score",
        help="zero-resource scores of a trained model: sWUGGY, sBLIMP, pairs, GenPPL",
        description="Score a trained model without text: how often it finds the right one of two recordings likelier, "
        "or how likely a text LM finds what it says.",
    )
    kinds = parser.add_subparsers(metavar="SCORE", dest="score", required=True, parser_class=type(parser))
    for name, what, source in (
        ("swuggy", "words against non-words", "lexical/dev of ZeroSpeech 2021: gold.csv and recordings"),
        ("sblimp", "sentences against ungrammatical ones", "syntactic/dev of ZeroSpeech 2021: gold.csv and recordings"),
        ("pairs", "any pairs, such as StoryCloze", "a TSV with the columns id, correct, incorrect"),
    ):
        kind = kinds.add_parser(name, help=what, description=f"Score {what}.")
        kind.add_argument("source", metavar="FILE" if name == "pairs" else "DIR", type=Path, help=source)
        add_model(kind)
        kind.add_argument("--sum", action="store_true", help="compare sums of log-likelihoods, not means over pieces")
        kind.set_defaults(handler=score_pairs, parser=kind)
    kind = kinds.add_parser(
        "genppl", help="perplexity of what it says", description="Let the model go on after prompts and score the text."
    )
    kind.add_argument("files", metavar="FILE", nargs="+", type=Path, help="recordings whose beginnings are the prompts")
    add_model(kind)
    kind.add_argument("--vocoder", metavar="DIR", type=Path, help="of the model's units (default: the demo's)")
    kind.add_argument("--prompt", metavar="SECONDS", type=_seconds, default=3.0, help="length of the prompts")
    kind.add_argument("--max-new", metavar="N", type=positive, default=150, help="most pieces that the model writes")
    kind.add_argument("--seed", metavar="N", type=int, default=0, help="of the model's draws")
    kind.add_argument("--text-lm", metavar="MODEL", default="pretrained:smollm2-135m", help="the text LM that judges")
    kind.set_defaults(handler=score_genppl, parser=kind)
    kind = kinds.add_parser(
        "speech",
        help="made speech beside its recordings: WER, CER, voice, UTMOS, a page to listen",
        description="Score folders of made speech beside the recordings that they were made from, as a table, a Parquet"
        " file of all utterances, and a page on which they are heard side by side.",
    )
    kind.add_argument("manifest", metavar="MANIFEST.tsv", type=Path, help="the recordings, with text and speaker")
    kind.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a system's sounds, STEM.wav for each recording's file"
    )
    kind.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    kind.add_argument(
        "--split", metavar="NAME", action="append", default=[], help="a split to score; repeatable (default: all)"
    )
    kind.add_argument("--limit", metavar="N", type=positive, default=0, help="only the first of each split; 0 for all")
    kind.add_argument(
        "--recognizer", metavar="MODEL", help="the Whisper that listens (default: pretrained:whisper-base)"
    )
    kind.set_defaults(handler=score_speech, parser=kind)
    kind = kinds.add_parser(
        "units",
        help="quality and bit rate of a run's units",
        description="Print the bit rate of units, and with alignments how well they tell phones apart; with --abx also "
        "how often a phone is nearer to another one than to itself, within and across speakers.",
    )
    kind.add_argument("units", metavar="DIR", type=Path, help="RUN/units of a run")
    kind.add_argument("--split", metavar="NAME", default="test", help="which utterances")
    kind.add_argument(
        "--alignments", metavar="PATH", type=Path, help="a CTM file, or a folder of TextGrids (default: bit rate only)"
    )
    kind.add_argument(
        "--abx",
        nargs="?",
        const="angular",
        choices=("angular", "identity"),
        help="measure ABX; frames differ by the angle between their units' centroids, or by identity of their units "
        "(default: no ABX; angular if nothing follows)",
    )
    kind.add_argument("--seed", metavar="N", type=whole, default=0, help="of the items that ABX draws")
    kind.set_defaults(handler=score_units, parser=kind)
    parser.set_defaults(commands=kinds.choices)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a length in seconds: give a number above 0")
    return value


def score_pairs(arguments: argparse.Namespace) -> None:
    """Print the accuracy over all pairs and over each group."""
    check_model(arguments.model)
    from sparq.recipes.scoring import score_pairs

    found = score_pairs(
        arguments.score, arguments.source, model=arguments.model, precision=arguments.precision, mean=not arguments.sum
    )
    for name, accuracy in found.items():
        print(f"{name}\t{accuracy.percent:.2f} %\t{accuracy.items} items, {accuracy.pairs} pairs")


def score_genppl(arguments: argparse.Namespace) -> None:
    """Print what was heard, and its perplexity."""
    check_model(arguments.model)
    check_recordings(arguments.files)
    from sparq.recipes.scoring import generative_perplexity

    found = generative_perplexity(
        arguments.files, model=arguments.model, vocoder=arguments.vocoder, precision=arguments.precision,
        prompt_seconds=arguments.prompt, max_new=arguments.max_new, seed=arguments.seed, text_lm=arguments.text_lm,
    )  # fmt: skip
    for file, text in zip(arguments.files, found.texts, strict=True):
        print(f"{file}\t{text}")
    print(f"GenPPL\t{found.value:.2f}\t{found.tokens} tokens, {found.left_out} continuations left out")


def score_speech(arguments: argparse.Namespace) -> None:
    """Print the table and say where the page is."""
    if not arguments.manifest.is_file():
        raise SparqError(f"no manifest {arguments.manifest}: it is a TSV of recordings, such as RUN/manifest.tsv")
    for folder in arguments.folders:
        if not folder.is_dir():
            raise SparqError(f"no folder {folder}: give folders of sounds, such as `sparq resynthesize` writes")
    from sparq.recipes.speech_score import score_speech, score_table
    from sparq.report.tables import draw
    from sparq.vocoder.recognizer import WHISPER

    recognizer = arguments.recognizer or WHISPER
    scores = score_speech(
        arguments.manifest, arguments.folders, out=arguments.out, splits=arguments.split, most=arguments.limit,
        recognizer=recognizer,
    )  # fmt: skip
    print(draw(score_table(scores, recognizer)))
    print(f"listen: {arguments.out / 'listen.html'}")


def score_units(arguments: argparse.Namespace) -> None:
    """Print bit rate, quality if there are alignments, and ABX if it is asked for."""
    from sparq.recipes.unit_score import score_units

    found = score_units(arguments.units, arguments.split, arguments.alignments, abx=arguments.abx, seed=arguments.seed)
    rate, quality = found.bit_rate, found.quality
    print(f"bit rate\t{rate.bits_per_second:.1f} bit/s\t{rate.units_per_second:.2f} units/s of {rate.entropy:.2f} bits")
    if quality is not None:
        print(f"PNMI\t{quality.pnmi:.4f}\t{quality.phones} phones, {quality.units} units")
        print(f"phone purity\t{quality.phone_purity:.4f}\t{quality.frames} frames, {found.left_out} left out")
        print(f"cluster purity\t{quality.cluster_purity:.4f}\t{found.aligned} of {found.utterances} utterances aligned")
    if found.abx is not None:
        for name, errors in (("within", found.abx.within), ("across", found.abx.across)):
            if errors is not None:
                counts = f"{errors.triples} triples, {errors.phone_pairs} ordered pairs of phones"
                print(f"ABX {name}\t{100 * errors.error:.2f} %\t{counts}")
            else:
                one = name == "across" and found.abx.speakers == 1
                print(f"ABX {name}\tnone\t{'all phones are by one speaker' if one else 'no triple fits'}")
        print(f"ABX items\t{found.abx.items}\t{found.abx.speakers} speakers, {found.left_out_of_abx} phones left out")
