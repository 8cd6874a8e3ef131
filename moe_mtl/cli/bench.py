"""Measures side by side, in one run, the same work for every contender.

moe-mtl bench tabular --models mmoe --batches 1 64
moe-mtl bench tabular --help               tells the options of one measurement
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from ._arguments import Parser, one_of
from ._console import print_json, quiet_libraries, say


def configure(parser: Parser) -> None:
    names = benches()
    parser.add_argument("name", type=one_of(names), metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of that measurement")


def run(arguments: argparse.Namespace) -> None:
    bench = importlib.import_module(f"moe_mtl.bench.{arguments.name}")
    parser = Parser(prog=f"moe-mtl bench {arguments.name}", description=bench.__doc__)
    declare(parser, bench.Options)
    parser.add_json()
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    parsed, unknown = parser.parse_known_args(arguments.rest)
    parser.refuse(unknown)
    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(bench.Options)}
    options = bench.Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    with quiet_libraries():
        if parsed.json:
            print_json(bench.run(options, say))
        else:
            bench.main(options)


def benches() -> list[str]:
    """The measurements: files of `moe_mtl.bench` with a class `Options` and a function `main`; none is imported."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "bench").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^class Options\b", source, re.M) and re.search(r"^def main\(", source, re.M):
            found.append(path.stem)
    return found


def declare(parser: Parser, options: type) -> None:
    """One option per field of a dataclass; its docstring's `Attributes` are the help."""
    told = _attributes(options.__doc__ or "")
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flag, text = f"--{field.name.replace('_', '-')}", told.get(field.name, "").replace("%", "%%")
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        settings: dict[str, Any] = {"dest": field.name, "default": field.default, "help": text}
        if kind is bool:
            parser.add_argument(flag, action="store_true", **settings)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, nargs="+", type=typing.get_args(kind)[0], metavar=field.name.upper(), **settings)
        else:
            parser.add_argument(flag, type=kind, metavar=field.name.upper(), **settings)


def _attributes(docstring: str) -> dict[str, str]:
    """The entries under `Attributes:`, each as one line however it was wrapped."""
    _, _, section = inspect.cleandoc(docstring).partition("\nAttributes:\n")
    section = re.split(r"^(?=\S)", section, maxsplit=1, flags=re.M)[0]
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}
