"""`sparq quantize` of a model that is in no recipe, and `sparq perplexity`."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.arguments import Parser, positive
from sparq.errors import SparqError

_MODEL_OPTIONS = (
    "scheme", "method", "weight_bits", "activation_bits", "group_size", "seed", "attention", "calibration", "tokens",
    "context",
)  # fmt: skip
_TOKENS, _CONTEXT = 16384, 1024


def is_recipe(text: Path) -> bool:
    """Tell a recipe from a model by its name."""
    return text.suffix in (".yaml", ".yml")


def add_quantize_options(parser: Parser) -> None:
    """Add what is for models outside of recipes; no option has a default, so that a recipe can refuse them."""
    group = parser.add_argument_group("options of a MODEL")
    group.add_argument(
        "--scheme", metavar="NAME", help="for example w4a4-rotation, w4a16g128-gptq (default: none, see --method)"
    )
    group.add_argument(
        "--method", metavar="NAME", help="with the bits, instead of --scheme (default: that of --scheme)"
    )
    for name, metavar, text in (
        ("weight", "BITS", "2 to 8, or 16"),
        ("activation", "BITS", "2 to 8, or 16"),
    ):
        group.add_argument(f"--{name}-bits", metavar=metavar, type=positive, help=f"{text} (default: that of --scheme)")
    group.add_argument(
        "--group-size", metavar="N", type=positive, help="input features that share a weight scale (default: all)"
    )
    group.add_argument("--seed", metavar="N", type=_whole, help="of random rotations (default: 0)")
    group.add_argument(
        "--attention", metavar="NAME", help="run the model with this attention (default: the one that it names)"
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text to calibrate on (default: none, if the method needs none)",
    )
    group.add_argument("--tokens", metavar="N", type=positive, help=f"tokens of that text (default: {_TOKENS})")
    group.add_argument("--context", metavar="N", type=positive, help=f"tokens of a sequence (default: {_CONTEXT})")


def refuse_model_options(arguments: argparse.Namespace) -> None:
    """Refuse, with a recipe, what only a model has."""
    for name in _MODEL_OPTIONS:
        if getattr(arguments, name) is not None:
            raise SparqError(
                f"--{name.replace('_', '-')} is for a model: what a recipe quantizes, its section quantize says"
            )


def quantize_model(arguments: argparse.Namespace) -> None:
    """Quantize a model and print where it is, its scheme and the size of its weights."""
    for option, given in (("--skip-bad", arguments.skip_bad), ("--overwrite", arguments.overwrite)):
        if given:
            raise SparqError(f"{option} is for a recipe: {arguments.recipe} does not end in .yaml, so it is a model")
    if arguments.out.exists():
        raise SparqError(f"{arguments.out} exists: choose a folder that does not, nothing is overwritten")
    if arguments.calibration is not None and not arguments.calibration.is_file():
        raise SparqError(f"no such file: {arguments.calibration}")
    for name in ("tokens", "context"):
        if getattr(arguments, name) == 1:
            raise SparqError(f"--{name} is 1: it must be 2 or more")
    from sparq.quantization import QuantizationScheme
    from sparq.recipes.causal_lm import check_calibration, quantize_causal_lm

    scheme = QuantizationScheme.from_dict(_settings(arguments))
    check_calibration(scheme, arguments.calibration)
    size = quantize_causal_lm(
        str(arguments.recipe),
        arguments.out,
        scheme,
        attention=arguments.attention,
        calibration=arguments.calibration,
        tokens=arguments.tokens or _TOKENS,
        context=arguments.context or _CONTEXT,
    )
    print(f"{arguments.out}\t{scheme.name}\t{size / 1e6:.1f} MB")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options and `--set` say of the scheme; no setting may come from two of them."""
    from sparq.configuration import apply_overrides
    from sparq.quantization.names import settings_of_name

    given = {
        name: getattr(arguments, name)
        for name in ("method", "weight_bits", "activation_bits", "group_size", "seed")
        if getattr(arguments, name) is not None
    }
    settings: dict[str, Any] = {}
    for source in (
        {} if arguments.scheme is None else settings_of_name(arguments.scheme),
        given,
        apply_overrides({}, arguments.overrides),
    ):
        if twice := sorted(settings.keys() & source.keys()):
            raise SparqError(f"{twice[0]} is given twice, as {settings[twice[0]]!r} and as {source[twice[0]]!r}")
        settings |= source
    return settings


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def add_commands(commands: Any) -> None:
    """Add `sparq perplexity`; `sparq quantize` is among the steps of a recipe."""
    parser = commands.add_parser(
        "perplexity",
        help="measure the perplexity of any causal LM, quantized or not, on a text",
        description="Print, for each model, its perplexity on running text and the number of tokens that it is the "
        "mean over. A window's first token is not counted.",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a folder of sparq quantize, any folder, a hub name, pretrained:NAME"
    )
    parser.add_argument("--text", metavar="FILE", type=Path, help="the text (default: the demo's page of prose)")
    parser.add_argument("--tokens", metavar="N", type=positive, default=8192, help="most tokens to measure on")
    parser.add_argument("--context", metavar="N", type=positive, default=2048, help="most tokens of a window")
    parser.add_argument(
        "--attention",
        metavar="NAME",
        help="run models that are not quantized with this attention (default: the one that each names)",
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="take the tokenizer from there (default: from each model's own folder)"
    )
    parser.add_argument("--integers", action="store_true", help="compute quantized models with integers, on a CPU")
    parser.set_defaults(handler=print_perplexity, parser=parser)


def print_perplexity(arguments: argparse.Namespace) -> None:
    """Print a line for each model."""
    if arguments.text is not None and not arguments.text.is_file():
        raise SparqError(f"no such file: {arguments.text}")
    for name in ("tokens", "context"):
        if getattr(arguments, name) == 1:
            raise SparqError(f"--{name} is 1: perplexity needs 2 or more")
    from sparq.recipes.causal_lm import text_perplexity

    for reference in arguments.models:
        found = text_perplexity(
            reference,
            arguments.text,
            attention=arguments.attention,
            tokenizer=arguments.tokenizer,
            tokens=arguments.tokens,
            context=arguments.context,
            integers=arguments.integers,
        )
        print(f"{reference}\t{found.value:.4f}\t{found.num_tokens}", flush=True)
