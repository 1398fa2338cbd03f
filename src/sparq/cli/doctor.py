"""`sparq doctor`: what would go wrong with a model."""

import argparse
from typing import Any

_PANGRAM = "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun all day."


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="say what would go wrong with a model",
        description="Run a causal LM on a sentence and look at how it is put together: lost masks and padding, sinks "
        "that are not used, NaN, overflow, tied weights, metrics that do not compare. Exits with 1 on a fault.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, or pretrained:NAME")
    parser.add_argument(
        "--attention", metavar="NAME", help="run it under this attention (default: the one that it names)"
    )
    parser.set_defaults(handler=examine_model, parser=parser)


def examine_model(arguments: argparse.Namespace) -> int:
    """Print the findings."""
    from transformers import AutoTokenizer

    from sparq.evaluation.doctor import examine
    from sparq.models import load_model, saved_attention
    from sparq.pretrained import resolve_model

    reference = resolve_model(arguments.model)
    model = load_model(reference, arguments.attention)
    ids = AutoTokenizer.from_pretrained(reference)(_PANGRAM, return_tensors="pt").input_ids[0]
    findings = examine(model, ids)
    spec = saved_attention(model)
    print(f"{arguments.model}: {model.config.model_type}, {spec.name if spec else 'not converted'}")
    for finding in findings:
        print(f"{finding.severity}: {finding.what}\n    {finding.remedy}")
    if not findings:
        print("nothing found")
    return 1 if any(finding.severity == "fault" for finding in findings) else 0
