"""`sparq convert`: give a causal LM another attention, and see first what that would take away."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparq.cli.arguments import positive
from sparq.errors import SparqError
from sparq.files import atomic_path

if TYPE_CHECKING:
    from sparq.evaluation import RemovedMass

_REPORTED = ("softmax1", "max_shift", "clipped")


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="give any supported causal LM another attention",
        description="Replace the attention of a pretrained causal LM and save it; sparq.load_model loads it back. "
        "With --report, print for each layer and head how much attention variants would take from the model as it is.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, or pretrained:NAME")
    parser.add_argument(
        "--attention",
        metavar="NAME",
        help="the variant, for example softmax1 or softmax1+gated; all are in docs/attention.md (default: none, then "
        "--report is needed)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to make (default: none, nothing is saved)")
    parser.add_argument("--report", action="store_true", help="print the attention that variants would take away")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="text to measure on (default: the demo's page of prose)"
    )
    parser.add_argument("--tokens", metavar="N", type=positive, default=1024, help="most tokens to measure on")
    parser.set_defaults(handler=convert_model, parser=parser)


def convert_model(arguments: argparse.Namespace) -> None:
    """Report, then convert and save."""
    if not arguments.report and (arguments.attention is None or arguments.out is None):
        raise SparqError("sparq convert needs --attention NAME with --out DIR, or --report, or all three")
    if (arguments.attention is None) != (arguments.out is None):
        given = "--attention" if arguments.out is None else "--out"
        raise SparqError(f"{given} is given alone: --attention NAME says what to make and --out DIR where")
    if arguments.out is not None and arguments.out.exists():
        raise SparqError(f"{arguments.out} exists: choose a folder that does not, nothing is overwritten")
    if arguments.text is not None and not arguments.text.is_file():
        raise SparqError(f"no such file: {arguments.text}")
    from sparq.attention import AttentionSpec
    from sparq.models import convert, load_model
    from sparq.pretrained import resolve_model

    wanted = None if arguments.attention is None else AttentionSpec.parse(arguments.attention)
    reference = resolve_model(arguments.model)
    model = load_model(reference)
    if arguments.report:
        variants = [*_REPORTED, *([] if wanted is None or wanted.name in _REPORTED else [wanted.name])]
        from sparq.evaluation import removed_mass
        from sparq.recipes.prose import load_tokenizer, prose_pieces

        tokenizer = load_tokenizer(reference)
        pieces = prose_pieces(model, tokenizer, arguments.text, tokens=arguments.tokens, context=512)
        _print_removed(removed_mass(model, [{"input_ids": piece[None]} for piece in pieces], variants))
    if wanted is None:
        return
    convert(model, wanted)
    from transformers import AutoTokenizer

    with atomic_path(arguments.out) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(reference).save_pretrained(folder)
    print(f"{arguments.out}\t{wanted.name}")


def _print_removed(found: "RemovedMass") -> None:
    _, layers, heads = found.mass.shape
    print(f"attention taken away, % of the pretrained softmax's, on {found.num_tokens} tokens; rows are layers")
    for variant, mass in zip(found.variants, found.mass, strict=True):
        print(f"\n{variant}: {100 * mass.mean():.2f} % on average")
        print("  layer" + "".join(f"{f'h{head}':>7}" for head in range(heads)) + "   mean")
        for layer in range(layers):
            row = "".join(f"{100 * value:7.1f}" for value in mass[layer].tolist())
            print(f"{layer:7}{row}{100 * mass[layer].mean():7.1f}")
