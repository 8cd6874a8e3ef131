"""Lists the recipes that come with the library; `show` prints one, `copy` writes one where you can change it.

moe-mtl recipes
moe-mtl recipes show digits/mmoe
moe-mtl recipes copy digits/mmoe mine.yaml
"""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser, UsageError, one_of
from ._console import print_json, say, table

ACTIONS = ("list", "show", "copy")


def configure(parser: Parser) -> None:
    parser.add_argument("action", nargs="?", default="list", type=one_of(ACTIONS), metavar="list|show|copy")
    parser.add_argument("name", nargs="?", help="of a recipe, <data set>/<model>")
    parser.add_argument("dest", nargs="?", help="file or folder to copy to; by default here")
    parser.add_json()


def run(arguments: argparse.Namespace) -> None:
    from ..files import write_atomically
    from ..training.recipe import find_recipe, list_recipes

    if arguments.action == "list":
        if arguments.name is not None:
            raise UsageError(f"unexpected argument {arguments.name!r}: moe-mtl recipes list takes none")
        rows = [_row(name) for name in list_recipes()]
        print_json(rows) if arguments.json else print(table(rows))
        return
    if arguments.name is None:
        raise UsageError(
            f"moe-mtl recipes {arguments.action}: expected the name of a recipe; moe-mtl recipes lists them"
        )
    source = find_recipe(arguments.name)
    text = source.read_text(encoding="utf-8")
    if arguments.action == "show":
        print(text, end="" if text.endswith("\n") else "\n")
        return
    dest = arguments.dest or "."
    if dest.endswith("/") and not Path(dest).is_dir():
        raise FileNotFoundError(f"there is no folder {dest}")
    target = Path(dest)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another name")
    write_atomically(target, text)
    say(f"wrote {target}; train it with: moe-mtl train {target}")


def _row(name: str) -> dict[str, Any]:
    from ..training.recipe import load_recipe

    recipe = load_recipe(name)
    return {
        "recipe": name,
        "data": recipe.data.name,
        "model": recipe.model.type or f"from {recipe.model.source}",
        "card": recipe.card.name,
        "budget": recipe.card.budget,
    }
