"""`sparq prepare` to `sparq report`, `sparq run` and `sparq recipe`: the steps of a recipe."""

import argparse
from pathlib import Path
from typing import Any

from sparq.cli import quantize
from sparq.cli.arguments import Parser, add_recipe

STEP_HELP = {
    "prepare": "read the manifests, check every recording and split the corpora",
    "units": "train the k-means and turn speech into units",
    "vocab": "train the joint vocabulary of units and text",
    "train": "adapt the pretrained LLM, once for each framework",
    "quantize": "make the low-bit models",
    "evaluate": "measure the four tasks and the outliers at each precision",
    "report": "write results.json and report.html",
}
"""The steps in their order; the runner's list must have the same names."""


def add_commands(commands: Any) -> None:
    """Add the subcommands of the pipeline."""
    for name, text in STEP_HELP.items():
        parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_run_options(parser)
        parser.set_defaults(handler=run_one, step=name, parser=parser)
    _let_quantize_models(commands.choices["quantize"])
    _let_train_plan(commands.choices["train"])

    parser = commands.add_parser(
        "run",
        help="do all steps of a recipe that are not done yet",
        description="Do all steps of a recipe, from the recordings to the report. What is done already is "
        "kept, so that the same command goes on after an interruption.",
    )
    _add_run_options(parser)
    parser.add_argument(
        "--until",
        metavar="STEP",
        default=None,
        help="the last step to do (default: all steps, up to the report)",
    )
    parser.set_defaults(handler=run_all, parser=parser)

    parser = commands.add_parser(
        "recipe",
        help="check a recipe, or show it with all defaults",
        description="Check a recipe. Nothing is run.",
    )
    add_recipe(parser)
    parser.add_argument("--show", action="store_true", help="print the recipe with all defaults and paths resolved")
    parser.set_defaults(handler=check_recipe, parser=parser)


def _let_quantize_models(parser: Parser) -> None:
    """Let `sparq quantize` take a model instead of a recipe too."""
    place = next(action for action in parser._actions if action.dest == "recipe")
    place.metavar, place.help = "RECIPE.yaml|MODEL", "the recipe; or a folder, a hub name, or pretrained:NAME"
    parser.description = (
        "Make the low-bit models of a recipe's run, or a low-bit copy of any causal LM in the folder --out. With a "
        "MODEL, --set is for any setting of docs/quantization.md, for example weight_range=mse."
    )
    quantize.add_quantize_options(parser)
    parser.set_defaults(handler=quantize_either)


def _let_train_plan(parser: Parser) -> None:
    """Let `sparq train` say what it will take, for which it needs no run folder."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print parameters, memory and time of each framework, measured in a minute or so, and train nothing; "
        "with --out, lengths of sequences are those of the run's units",
    )
    place = next(action for action in parser._actions if action.dest == "out")
    place.required, place.help = False, f"{place.help} (default: none, required without --plan)"
    parser.set_defaults(handler=train_or_plan)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--out", metavar="RUN", type=Path, required=True, help="the run folder; new, or one to go on with"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad recordings out, counted and listed, instead of stopping",
    )
    parser.add_argument(
        "--overwrite",
        metavar="STEP",
        action="append",
        default=[],
        help="throw away what this step and the steps that need it have made, such as units or "
        "train-softmax1; repeatable (default: nothing is overwritten)",
    )


def run_one(arguments: argparse.Namespace) -> None:
    """Do one step."""
    run_folder = _run(arguments, only=arguments.step)
    if arguments.step == "report":
        print_results(run_folder)


def train_or_plan(arguments: argparse.Namespace) -> None:
    """Do the step, or say what it will take."""
    if not arguments.plan:
        if arguments.out is None:
            arguments.parser.error("the following arguments are required: --out")
        run_one(arguments)
        return
    from sparq.recipes.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from sparq.recipes.run_folder import RunFolder
    from sparq.recipes.train_plan import plan_training

    print(plan_training(recipe, None if arguments.out is None else RunFolder(arguments.out)).text())


def quantize_either(arguments: argparse.Namespace) -> None:
    """Do the step of a recipe, or quantize a model."""
    if quantize.is_recipe(arguments.recipe):
        quantize.refuse_model_options(arguments)
        run_one(arguments)
    else:
        quantize.quantize_model(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Do all steps, or all up to one."""
    run_folder = _run(arguments, until=arguments.until)
    if arguments.until in (None, "report"):
        print_results(run_folder)


def print_results(run_folder: Any) -> None:
    """Print the table and where the report is."""
    from sparq.report import read_results, render_terminal

    print(render_terminal(read_results(run_folder.results)))
    print(f"\nreport: {run_folder.report}")


def _run(arguments: argparse.Namespace, **which: str | None) -> Any:
    from sparq.recipes.recipe import load_recipe
    from sparq.recipes.run_folder import RunFolder

    skip = ["prepare.skip_bad=true"] if arguments.skip_bad else []
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *skip])

    # Only now, because PyTorch comes with it: a mistake in the recipe shows at once.
    from sparq.recipes.pipeline import STEPS
    from sparq.recipes.steps import run_steps
    from sparq.recipes.train_together import announce, check_processes, follow, is_follower, leave

    run_folder = RunFolder(arguments.out)
    check_processes(which.get("only"))
    if is_follower():
        follow(recipe, run_folder)
        leave()
        return run_folder
    try:
        run_steps(recipe, run_folder, STEPS, overwrite=arguments.overwrite, **which)
    finally:
        announce(None)
        leave()
    return run_folder


def check_recipe(arguments: argparse.Namespace) -> None:
    """Check a recipe and show it if asked."""
    from sparq.configuration import dump_yaml, to_mapping
    from sparq.recipes.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(dump_yaml(to_mapping(recipe)) if arguments.show else f"{arguments.recipe}: no mistakes found")
