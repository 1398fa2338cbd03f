"""`sparq quantize` of a model that is in no recipe, `sparq sensitivity` and `sparq perplexity`."""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparq.cli.arguments import Parser, points, positive, share, whole
from sparq.errors import SparqError
from sparq.types import TASKS

if TYPE_CHECKING:
    from sparq.recipes.subject import Data

_TOKENS, _CONTEXT, _TEXT_TOKENS, _UTTERANCES, _BETTER = 16384, 1024, 2048, 100, "w8"
_BY = ("layer", "block", "kind")
_BETTER_BITS = re.compile(r"w(\d+)(?:a(\d+))?")


def is_recipe(text: Path) -> bool:
    """Tell a recipe from a model by its name."""
    return text.suffix in (".yaml", ".yml")


def add_quantize_options(parser: Parser) -> None:
    """Add what is for models outside of recipes; no option has a default, so that a recipe can refuse them."""
    group = parser.add_argument_group("options of a MODEL")
    _add_scheme(group)
    _add_data(group, "to keep a --budget on")
    group.add_argument(
        "--budget",
        metavar="SHARE",
        type=share,
        help="give parts more bits until no perplexity is more than this share above that in floating point, for "
        "example 0.05 (default: none, all layers have the same bits)",
    )
    group.add_argument(
        "--budget-wer",
        metavar="POINTS",
        type=points,
        help="the same until the word error rate of a trained SpeechLM is at most so many points above that in "
        "floating point, for example 0.5 (default: none); with --budget both have to be kept",
    )
    group.add_argument(
        "--utterances",
        metavar="N",
        type=positive,
        help=f"most utterances of the split valid to count word errors on (default: {_UTTERANCES})",
    )
    group.add_argument(
        "--better", metavar="BITS", help=f"their bits, for example w8 or w8a8 (default: {_BETTER})", type=_better
    )
    group.add_argument("--by", choices=_BY, help="what gets more bits together (default: layer)")
    group.add_argument(
        "--resume",
        metavar="DIR",
        type=Path,
        help="keep what is finished there, and go on from it (default: nothing is kept)",
    )
    parser.set_defaults(model_options=[action.dest for action in group._group_actions])


def _add_scheme(group: Any) -> None:
    group.add_argument(
        "--scheme", metavar="NAME", help="for example w4a4-rotation, w4a16g128-gptq (default: none, see --method)"
    )
    group.add_argument(
        "--method", metavar="NAME", help="with the bits, instead of --scheme (default: that of --scheme)"
    )
    for name in ("weight", "activation"):
        group.add_argument(
            f"--{name}-bits", metavar="BITS", type=positive, help="2 to 8, or 16 (default: that of --scheme)"
        )
    group.add_argument(
        "--group-size", metavar="N", type=positive, help="input features that share a weight scale (default: all)"
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="settings of the papers, of the original code, or for a short time: paper, anchor "
        "or fast (default: those of the method)",
    )
    group.add_argument(
        "--seed", metavar="N", type=whole, help="of random rotations and of a SpeechLM's sequences (default: 0)"
    )
    group.add_argument(
        "--attention", metavar="NAME", help="run the model with this attention (default: the one that it names)"
    )


def _add_data(group: Any, purpose: str) -> None:
    group.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text to calibrate on (default: none, if the method needs none)",
    )
    group.add_argument("--tokens", metavar="N", type=positive, help=f"tokens to calibrate on (default: {_TOKENS})")
    group.add_argument("--context", metavar="N", type=positive, help=f"tokens of a sequence (default: {_CONTEXT})")
    group.add_argument(
        "--tasks", metavar="TASK", nargs="+", choices=TASKS, help="tasks of a trained SpeechLM (default: all four)"
    )
    group.add_argument("--text", metavar="FILE", type=Path, help=f"text {purpose} (default: the demo's page of prose)")
    group.add_argument("--text-tokens", metavar="N", type=positive, help=f"most tokens of it (default: {_TEXT_TOKENS})")


def refuse_model_options(arguments: argparse.Namespace) -> None:
    """Refuse, with a recipe, what only a model has."""
    for name in arguments.model_options:
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
    budgets = (arguments.budget, arguments.budget_wer)
    for name in ("better", "by", "text", "text_tokens"):
        if budgets == (None, None) and getattr(arguments, name) is not None:
            raise SparqError(
                f"--{name.replace('_', '-')} goes with --budget: without one every layer has the same bits"
            )
    if arguments.budget_wer is None and arguments.utterances is not None:
        raise SparqError("--utterances goes with --budget-wer: without it no word errors are counted")
    if budgets != (None, None) and arguments.resume is not None:
        raise SparqError("--resume keeps one quantization and --budget makes several: leave one out")
    data = _data(arguments)
    from sparq.quantization import QuantizationScheme
    from sparq.recipes.causal_lm import Budget, check_calibration, quantize_causal_lm

    scheme = QuantizationScheme.from_dict(_settings(arguments))
    check_calibration(str(arguments.recipe), scheme, data)
    budget = None
    if budgets != (None, None):
        budget = Budget(
            share=arguments.budget, points=arguments.budget_wer, better=arguments.better or _better(_BETTER),
            by=arguments.by or "layer",
        )  # fmt: skip
    mixed = quantize_causal_lm(
        str(arguments.recipe), arguments.out, scheme, data, attention=arguments.attention, budget=budget,
        resume=arguments.resume,
    )  # fmt: skip
    size = (arguments.out / "model.safetensors").stat().st_size
    print(f"{arguments.out}\t{scheme.name}\t{size / 1e6:.1f} MB")
    if mixed is not None:
        own, least, most = mixed.weight_bytes
        print(f"promoted\t{len(mixed.promoted)} of {len(mixed.report.parts)}\t{own:,} bytes of {least:,} to {most:,}")
        for name, loss in mixed.measured.items():
            rise = 100 * math.expm1(loss - mixed.report.full[name])
            print(f"{name}\t{math.exp(mixed.report.full[name]):.4f} to {math.exp(loss):.4f}\t{rise:+.2f} %")
        for name, (full, found) in mixed.error_rates.items():
            print(f"{name} WER %\t{full:.2f} to {found:.2f}\t{found - full:+.2f}")


def print_sensitivity(arguments: argparse.Namespace) -> None:
    """Print a line for each part, the most sensitive first."""
    if arguments.out is not None and arguments.out.exists():
        raise SparqError(f"{arguments.out} exists: choose a file that does not, nothing is overwritten")
    data = _data(arguments)
    from sparq.files import write_json
    from sparq.quantization import QuantizationScheme
    from sparq.recipes.causal_lm import causal_lm_sensitivity

    scheme = QuantizationScheme.from_dict(_settings(arguments))
    report = causal_lm_sensitivity(arguments.model, scheme, data, attention=arguments.attention, by=arguments.by)
    if arguments.out is not None:
        write_json(arguments.out, {"scheme": scheme.to_dict(), **dataclasses.asdict(report)})
    names = list(report.full)
    print("\t".join(["part", "weights", *names]))
    print("\t".join(["none", "0", *(f"{math.exp(report.full[name]):.4f}" for name in names)]))
    print("\t".join(["all", "all", *(f"{math.exp(report.quantized[name]):.4f}" for name in names)]))
    for part in sorted(report.parts, key=lambda part: part.worst, reverse=True):
        rises = (f"{100 * math.expm1(part.loss_change[name]):+.3f} %" for name in names)
        print("\t".join([part.part, str(part.num_weights), *rises]))


def _data(arguments: argparse.Namespace) -> "Data":
    for file in (arguments.calibration, arguments.text):
        if file is not None and not file.is_file():
            raise SparqError(f"no such file: {file}")
    for name in ("tokens", "context", "text_tokens"):
        if getattr(arguments, name) == 1:
            raise SparqError(f"--{name.replace('_', '-')} is 1: it must be 2 or more")
    from sparq.recipes.subject import Data

    return Data(
        calibration=arguments.calibration,
        tokens=arguments.tokens or _TOKENS,
        context=arguments.context or _CONTEXT,
        tasks=tuple(task for task in TASKS if task in (arguments.tasks or TASKS)),
        text=arguments.text,
        text_tokens=arguments.text_tokens or _TEXT_TOKENS,
        utterances=getattr(arguments, "utterances", None) or _UTTERANCES,
        seed=arguments.seed or 0,
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options and `--set` say of the scheme; no setting may come from two of them."""
    from sparq.configuration import apply_overrides
    from sparq.quantization.names import settings_of_name

    given = {
        name: getattr(arguments, name)
        for name in ("method", "weight_bits", "activation_bits", "group_size", "preset", "seed")
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


def _better(text: str) -> dict[str, int | float]:
    found = _BETTER_BITS.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form w8 or w8a8")
    if found[2] is None:
        return {"weight_bits": int(found[1])}
    return {"weight_bits": int(found[1]), "activation_bits": int(found[2]), "activation_clip": 1.0}


def add_commands(commands: Any) -> None:
    """Add `sparq sensitivity` and `sparq perplexity`; `sparq quantize` is among the steps of a recipe."""
    parser = commands.add_parser(
        "sensitivity",
        help="measure what each layer of a model suffers when it alone is quantized",
        description="Print, for each part of a causal LM or trained SpeechLM, how much each perplexity rises when the "
        "part alone is quantized, the most sensitive first. The lines none and all have the perplexities of the model "
        "in floating point and quantized.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, pretrained:NAME, or RUN/models/FRAMEWORK")
    _add_scheme(parser)
    _add_data(parser, "to measure on")
    parser.add_argument("--by", choices=_BY, default="layer", help="what a part is")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
        help="any other setting of docs/quantization.md; repeatable (default: those of the method)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the numbers too (default: only print)")
    parser.set_defaults(handler=print_sensitivity, parser=parser)

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
