"""`sparq paper`: the two papers' tables and figures, theirs and ours."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sparq.cli.arguments import add_overrides, positive
from sparq.errors import SparqError

RESULTS = Path("experiments") / "results.jsonl"
"""The results file of the repository."""

PROFILES = ("smoke", "small-opt", "small", "full")


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

    run = kinds.add_parser(
        "run",
        help="train, quantize and measure what a table or figure compares",
        description="Train, quantize and measure the models of a table or figure, and print the results beside the "
        "papers'. What is done already is kept, so that the same command goes on after an interruption. Profile smoke "
        "is a tiny random model on tones, a check; small-opt a small OPT on the demo's corpus, minutes; small is "
        "SmolLM2-135M on the same, hours; full prints the commands of the papers' size with expected hours and disk, "
        "and runs nothing.",
    )
    run.add_argument("experiments", metavar="EXPERIMENT", nargs="+", help="names in `sparq paper list`, or all")
    size = run.add_mutually_exclusive_group()
    size.add_argument("--profile", choices=PROFILES, default="smoke", help="how much of it")
    size.add_argument(
        "--recipe",
        metavar="RECIPE.yaml",
        type=Path,
        help="in place of a profile, a recipe that gives backbone and speech",
    )
    run.add_argument("--out", metavar="DIR", type=Path, default=Path("runs") / "paper", help="the folder to work in")
    run.add_argument("--results", metavar="FILE", type=Path, help="the results file (default: results.jsonl in --out)")
    run.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of training and calibration; the speech keeps the recipe's"
    )
    for what, text in (
        ("framework", "with these attentions"),
        ("adaptation", "adapted so: full, lora, qlora, qlora-4bit"),
        ("precision", "at these precisions, such as full, w4a4-best"),
    ):
        run.add_argument(
            f"--{what}s", metavar="NAME", nargs="+", help=f"only models {text} (default: the experiment's)"
        )
    run.add_argument(
        "--shipped",
        action="store_true",
        help="take the demo's adapters, trained by the profile small with seed 0, instead of training them",
    )
    add_overrides(run)
    run.add_argument("--threads", metavar="N", type=positive, help="CPU threads (default: the profile's)")
    run.set_defaults(handler=run_experiments, parser=run)

    page = kinds.add_parser(
        "page", help="write docs/results.md", description="Write the page of all results, in Markdown."
    )
    page.add_argument("results", metavar="RESULTS", type=Path, nargs="?", default=RESULTS, help="the results file")
    page.add_argument("--out", metavar="FILE", type=Path, default=Path("docs") / "results.md", help="the page to write")
    page.set_defaults(handler=write_page, parser=page)

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
    if not find_experiment(arguments.table).is_printed:
        raise SparqError(f"{arguments.table} has no numbers in the papers: see `sparq paper list` for their tables")
    print(draw(published_table(published, published.table(arguments.table))))


def compare_results(arguments: argparse.Namespace) -> None:
    """Print our results beside the papers'."""
    from sparq.papers import EXPERIMENTS, find_experiment, load_published, read_records
    from sparq.papers.verdict_views import RESULT_TABLES, by_group
    from sparq.report.tables import draw

    chosen = [find_experiment(name) for name in arguments.experiment] or list(EXPERIMENTS)
    records = read_records(arguments.results)
    if not records:
        raise SparqError(f"{arguments.results} has no results: name a results file of `sparq paper run`")
    published = load_published()
    tables = [
        view(published, experiment, own) for experiment in chosen for own in by_group(records) for view in RESULT_TABLES
    ]
    found = [draw(table) for table in tables if table is not None]
    if not found:
        raise SparqError(f"{arguments.results} has nothing of {', '.join(e.name for e in chosen)}")
    print("\n\n".join(found))


def run_experiments(arguments: argparse.Namespace) -> None:
    """Run experiments, or print how."""
    from sparq.papers import EXPERIMENTS, find_experiment, restricted

    every = arguments.experiments == ["all"]
    chosen = list(EXPERIMENTS) if every else [find_experiment(name) for name in arguments.experiments]
    if arguments.recipe is None and arguments.profile == "full":
        from sparq.papers.full_plan import full_plan, full_preamble

        print("\n\n".join([full_preamble(), *(full_plan(experiment) for experiment in chosen)]))
        return
    for experiment in chosen:
        if not (experiment.measures or every):
            raise SparqError(f"{experiment.name} is a drawing: there is nothing to run")
    if arguments.shipped and (arguments.recipe, arguments.profile, arguments.seed) != (None, "small", 0):
        raise SparqError("--shipped is for --profile small with --seed 0: the demo has no other adapters")
    from sparq.papers.experiments import CellKey
    from sparq.papers.profiles import recipe_profile, small_opt_profile, small_profile, smoke_profile
    from sparq.papers.runner import run_experiment

    if arguments.recipe is not None:
        profile = recipe_profile(arguments.recipe, arguments.overrides)
    else:
        folder = arguments.out / arguments.profile
        if arguments.profile == "small":
            profile = small_profile(folder, arguments.overrides, shipped=arguments.shipped)
        elif arguments.profile == "small-opt":
            profile = small_opt_profile(folder, arguments.overrides)
        elif arguments.overrides:
            raise SparqError(
                "--set changes a recipe, and the profile smoke has none: name --profile small or a --recipe"
            )
        else:
            profile = smoke_profile(folder)
    if arguments.threads is not None:
        profile = replace(profile, recipe=replace(profile.recipe, threads=arguments.threads))
    keys: tuple[CellKey, ...] = get_args(CellKey)
    for key in keys:
        if names := getattr(arguments, f"{key}s"):
            chosen = restricted(chosen, key, names)
    results = arguments.results or arguments.out / "results.jsonl"
    for experiment in chosen:
        if experiment.measures:
            run_experiment(experiment, profile, out=arguments.out, results=results, seed=arguments.seed)
    compare_results(argparse.Namespace(results=results, experiment=[e.name for e in chosen if e.measures]))
    print(f"\nresults: {results}")


def write_page(arguments: argparse.Namespace) -> None:
    """Write the page of all results."""
    from sparq.files import write_text
    from sparq.papers import read_records
    from sparq.papers.results_page import results_page

    folder = arguments.results.resolve().parent
    # As seen from the repository's docs/, wherever the page is written.
    pictures = sorted((folder / "figures").glob("**/*.svg"))
    figures = [f"../{folder.name}/{file.relative_to(folder).as_posix()}" for file in pictures]
    write_text(arguments.out, results_page(read_records(arguments.results), figures))
    print(arguments.out)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


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
