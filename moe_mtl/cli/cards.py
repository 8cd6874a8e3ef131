"""The model cards, whose every number comes from a record.

moe-mtl cards check [NAME ...]             is each page what its record gives, and each file there?
moe-mtl cards build [NAME ...]             writes the pages anew from the records
moe-mtl cards reproduce [NAME ...]         trains the small records again and compares
moe-mtl cards make RECIPE                  trains a model and its baselines over the seeds, and writes a card

Trees beside a model: moe-mtl bench trees --model NAME --output DIR, then moe-mtl cards build NAME --external
DIR/trees.json.
"""

import argparse
from pathlib import Path

from ._arguments import OVERRIDES, Parser, UsageError, one_of
from ._console import print_json, quiet_libraries, say, table

ACTIONS = ("check", "build", "reproduce", "make")


def configure(parser: Parser) -> None:
    parser.add_argument("action", type=one_of(ACTIONS), metavar="check|build|reproduce|make")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cards (all by default); for make, one recipe")
    parser.add_argument("--budget", choices=("ci", "nightly"), help="which records; what a made one is for")
    parser.add_argument("--data.path", dest="data_path", metavar="PATH", help="the rows, where a data set reads a file")
    parser.add_argument("--baseline", metavar="RECIPE", help="make: the shared bottom to compare with")
    parser.add_argument("--runs", metavar="DIR", help="make: keep the trained models there")
    parser.add_argument(
        "--external", metavar="FILE", help="make, build: trees.json of moe-mtl bench trees, for the cards it compares"
    )
    parser.add_json()
    parser.set_defaults(**{OVERRIDES: []})


def run(arguments: argparse.Namespace) -> int:
    for key, value in arguments.overrides:
        if key != "data.path":
            raise UsageError(f"unknown option '--{key}': a card is made from its recipe as it stands")
        arguments.data_path = value
    names = arguments.names or "all"
    return {"check": _check, "build": _build, "reproduce": _reproduce, "make": _make}[arguments.action](
        arguments, names
    )


def _check(arguments: argparse.Namespace, names: list[str] | str) -> int:
    from ..cards import check

    problems = check(names)
    if arguments.json:
        print_json(problems)
    else:
        print("\n".join(problems) or "the cards are as their records give them")
    return 2 if problems else 0


def _build(arguments: argparse.Namespace, names: list[str] | str) -> int:
    from ..cards import build_card, build_index
    from ..hub import resolve, zoo

    folders = list(zoo().values()) if names == "all" else [resolve(name) for name in names]
    if arguments.external is not None:
        from ..cards.external import attach

        if names == "all":
            raise UsageError("moe-mtl cards build --external: expected the names of the cards, found none")
        for folder in folders:
            attach(folder, arguments.external)
    written = [str(path) for path in (*map(build_card, folders), *build_index())]
    print_json(written) if arguments.json else print("\n".join(f"wrote {path}" for path in written))
    return 0


def _reproduce(arguments: argparse.Namespace, names: list[str] | str) -> int:
    from ..cards.repeating import reproduce

    with quiet_libraries():
        found = reproduce(names, budget=arguments.budget or "ci", data_path=arguments.data_path, echo=say)
    rows = [vars(one) | {"agrees": one.agrees} for one in found]
    print_json(rows) if arguments.json else print(table(rows))
    return 0 if all(one.agrees for one in found) else 2


def _make(arguments: argparse.Namespace, names: list[str] | str) -> int:
    from ..cards.making import make

    if len(arguments.names) != 1:
        raise UsageError(f"moe-mtl cards make: expected one recipe, found {len(arguments.names)}")
    with quiet_libraries():
        folder = make(
            arguments.names[0],
            baseline=arguments.baseline,
            data_path=arguments.data_path,
            runs=arguments.runs,
            budget=arguments.budget or "nightly",
            external=arguments.external,
            echo=say,
        )
    print_json(str(Path(folder))) if arguments.json else say(f"wrote {folder}")
    return 0
