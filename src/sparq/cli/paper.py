"""`sparq paper`: the two papers' tables and figures, theirs and ours."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli.arguments import positive
from sparq.errors import SparqError

RESULTS = Path("experiments") / "results.jsonl"
"""The results file of the repository."""


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "paper",
        help="the two papers' tables and figures: theirs, and ours beside them",
        description="The tables and figures of the two papers that sparq follows.",
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    parser.set_defaults(commands=kinds.choices)

    listing = kinds.add_parser("list", help="all tables and figures", description="List all tables and figures.")
    listing.set_defaults(handler=list_experiments, parser=listing)

    show = kinds.add_parser(
        "show",
        help="a table as it was published",
        description="Print a published table. Average performance drops are computed again from each row's own "
        "metrics, and rows that disagree with themselves are marked.",
    )
    show.add_argument(
        "table", metavar="TABLE", help="its name in `sparq paper list`, `claims` for numbers of the texts"
    )
    show.set_defaults(handler=show_table, parser=show)

    compare = kinds.add_parser(
        "compare",
        help="our results beside the papers'",
        description="Print our results beside the papers', means over seeds.",
    )
    compare.add_argument("results", metavar="RESULTS", type=Path, nargs="?", default=RESULTS, help="the results file")
    compare.add_argument("--experiment", metavar="NAME", nargs="+", default=[], help="only these (default: all)")
    compare.set_defaults(handler=compare_results, parser=compare)

    norms = kinds.add_parser(
        "norms",
        help="the norms of SpARQ's proposition C.1 in a model",
        description="Print for every layer of a model max |X W_K| and, of a trained SpeechLM, max |(alpha / r) X B_Q "
        "A_Q|, which proposition C.1 compares with sqrt(log L).",
    )
    norms.add_argument("model", metavar="MODEL", help="a folder, a hub name, pretrained:NAME, or RUN/models/FRAMEWORK")
    norms.add_argument("--attention", metavar="NAME", help="run a causal LM with this one (default: its config's)")
    norms.add_argument("--text", metavar="FILE", type=Path, help="text for causal LMs (default: the demo's prose)")
    norms.add_argument("--tokens", metavar="N", type=positive, default=2048, help="tokens to measure on")
    norms.add_argument("--context", metavar="N", type=positive, default=512, help="most tokens of a sequence of text")
    norms.set_defaults(handler=print_norms, parser=norms)


def list_experiments(_: argparse.Namespace) -> None:
    """Print all tables and figures."""
    from sparq.papers.views import experiment_list
    from sparq.report.tables import draw

    print(draw(experiment_list()))


def show_table(arguments: argparse.Namespace) -> None:
    """Print a published table."""
    from sparq.papers import find_experiment, load_published
    from sparq.papers.views import claims_table, published_table
    from sparq.report.tables import draw

    published = load_published()
    if arguments.table == "claims":
        print(draw(claims_table(published)))
        return
    if find_experiment(arguments.table).figure:
        raise SparqError(f"{arguments.table} is a figure, whose numbers are not printed: see `sparq paper list`")
    print(draw(published_table(published, published.table(arguments.table))))


def compare_results(arguments: argparse.Namespace) -> None:
    """Print our results beside the papers'."""
    from sparq.papers import EXPERIMENTS, find_experiment, load_published, read_records
    from sparq.papers.views import comparison
    from sparq.report.tables import draw

    chosen = [find_experiment(name) for name in arguments.experiment] or list(EXPERIMENTS)
    records = read_records(arguments.results)
    if not records:
        raise SparqError(f"{arguments.results} has no results: name a results file of `sparq paper run`")
    published = load_published()
    groups = dict.fromkeys(record.group for record in records)
    tables = [
        comparison(published, experiment, [record for record in records if record.group == group])
        for experiment in chosen
        for group in groups
    ]
    found = [draw(table) for table in tables if table is not None]
    if not found:
        raise SparqError(f"{arguments.results} has nothing of {', '.join(e.name for e in chosen)}")
    print("\n\n".join(found))


def print_norms(arguments: argparse.Namespace) -> None:
    """Print the norms of proposition C.1."""
    if arguments.text is not None and not arguments.text.is_file():
        raise SparqError(f"no such file: {arguments.text}")
    from sparq.papers.norm_condition import norms_of
    from sparq.papers.views import norms_table
    from sparq.report.tables import draw

    norms = norms_of(
        arguments.model,
        attention=arguments.attention,
        text=arguments.text,
        tokens=arguments.tokens,
        context=arguments.context,
    )
    print(draw(norms_table(arguments.model, norms)))
