"""Trains a recipe and saves the model, its processor, the recipe and the metrics in one folder.

moe-mtl train digits/mmoe
moe-mtl train recipes/census-income/mmoe.yaml --data.path census.csv.gz --train.epochs 5 --output runs/mine
"""

import argparse
from pathlib import Path

from ._arguments import Parser
from ._console import metric_rows, print_json, quiet_libraries, say, table


def configure(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name (moe-mtl recipes lists them) or YAML file")
    parser.add_argument("--output", metavar="DIR", help="folder of the trained model; by default runs/<recipe>")
    parser.add_argument("--seed", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in the output folder")
    parser.add_json()
    parser.add_overrides()


def run(arguments: argparse.Namespace) -> None:
    from ..data import is_images, is_text
    from ..training.recipe import find_recipe, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    path = find_recipe(arguments.recipe).resolve()
    output = Path(arguments.output or f"runs/{path.parent.name}-{path.stem}")
    with quiet_libraries():
        from ..training.run import run as train

        say(f"training {recipe.model.type or recipe.model.source} on {recipe.data.name} into {output}")
        try:
            result = train(
                recipe, output, seed=arguments.seed, resume=arguments.resume, tell=lambda note: say(f"  {note}")
            )
        except KeyboardInterrupt:
            say(f"\nwhat was trained is kept where a checkpoint was written: add --resume --output {output} to go on")
            raise
    if arguments.json:
        print_json(result.record)
        return
    rows = [{"split": split} | row for split, metrics in result.metrics.items() for row in metric_rows(metrics)]
    print(table(rows))
    record = result.record
    took = f"{record['steps']:,} steps in {record['seconds']['train']:.1f} s"
    say(f"\n{record['parameters']:,} parameters, {took}; saved in {output}")
    if is_text(recipe.data.name):
        say(f"next: moe-mtl predict {output} PROMPTS.jsonl --output answers.jsonl")
    elif is_images(recipe.data.name):
        say(f"next: moe-mtl cost {output}; moe-mtl predict {output} PHOTO.jpg --output answers")
    else:
        say(f"next: moe-mtl cost {output}; moe-mtl predict {output} ROWS.csv --output answers.csv")
