"""Saves the smaller model that answers some tasks only, with a processor that asks for their labels only.

  moe-mtl extract runs/digits-mmoe digit --output runs/digit

Its answers are those of the full model; what each architecture saves, moe-mtl cost tells.
"""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser
from ._console import print_json, quiet_libraries, say


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument(
        "--fold",
        action="store_true",
        help="absorb batch norms into the weights (HoME): faster, and equal to rounding instead of to the bit",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_json()


def run(arguments: argparse.Namespace) -> None:
    with quiet_libraries():
        told = extract(arguments.model, arguments.tasks, arguments.output, arguments.fold)
    if arguments.json:
        print_json(told)
        return
    say(
        f"wrote {arguments.output}: {', '.join(told['tasks'])} with {told['parameters']:,} of "
        f"{told['parameters_of_all']:,} parameters"
    )


def extract(model: str | Path, tasks: list[str], output: str | Path, fold: bool = False) -> dict[str, Any]:
    """Writes the folder, whole or not at all, and tells what is in it."""
    from ..data import TabularProcessor
    from ..files import staged_folder, write_atomically
    from ..hub import resolve, write_manifest
    from ..models import AutoModelForMultiTask
    from ..training.recipe import RecipeError
    from ..training.saved import RECIPE, recipe_of

    folder = resolve(model)
    small = AutoModelForMultiTask.from_pretrained(folder, tasks=tasks)
    if fold:
        small.fold_for_inference()
    processor = TabularProcessor.from_pretrained(folder).for_tasks(small.tasks)
    try:
        recipe = recipe_of(folder).to_yaml()
    except RecipeError:
        recipe = None
    with staged_folder(output) as staging:
        small.save_pretrained(staging)
        processor.save_pretrained(staging)
        if recipe is not None:
            write_atomically(staging / RECIPE, recipe)
        write_manifest(staging)
    return {
        "output": str(output),
        "tasks": small.tasks,
        "parameters": small.num_parameters(),
        "parameters_of_all": type(small).count_parameters(type(small).config_class.from_pretrained(folder)),
    }
