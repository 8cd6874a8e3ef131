"""The command `moe-mtl`: a thin table of commands, each a file of this package that is imported when it is called.

A command's module has `configure(parser)`, which declares its arguments, and `run(arguments) -> exit code or None`,
which imports what it needs: nothing here imports torch, so that help appears at once.
"""

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .. import __version__
from ..naming import nearest
from ._arguments import OVERRIDES, HelpPrinted, Parser, UsageError, split_overrides

COMMANDS = {
    "models": "list the models of the zoo and the model types",
    "recipes": "list the recipes, show one, or copy one to change it",
    "train": "train a recipe; any of its keys can be set here",
    "evaluate": "measure a saved model on a split of its data or on a file",
    "predict": "answer rows of a CSV, Parquet or JSON-lines file",
    "extract": "save the smaller model that answers some tasks only",
    "prune": "extract tasks and leave out the experts that they seldom choose",
    "cost": "count parameters and multiply-adds of each task",
    "cards": "check, build or reproduce the model cards",
    "bench": "measure speed side by side with other libraries",
    "demo": "train, compare, extract and predict in a minute",
}
_USAGE = (
    "usage: moe-mtl COMMAND ...\n\nMixture-of-Experts models for multi-task learning.\n\ncommands:\n{commands}\n\n{end}"
)
_END = (
    "moe-mtl COMMAND --help tells more of each. Every command that prints a table prints JSON with --json;\n"
    "errors are one line and exit code 2, and --traceback shows where they come from.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 for an error, 130 when interrupted, 141 when nobody reads on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("moe-mtl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes once more on its way out: into nothing, then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"moe-mtl: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if arguments[1:] and arguments[0] == "help":
            return _dispatch([arguments[1], "--help"])
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        print(_USAGE.format(commands=listed, end=_END), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"moe-mtl {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {what} {name!r}{nearest(name, COMMANDS)}")
    command = importlib.import_module(f".{name}", __name__)
    try:
        return command.run(_parse(name, command, rest)) or 0
    except HelpPrinted:
        return 0


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Warnings that this library raises, as a line; other libraries' are notes to their programmers."""
    caller = sys._getframe(1)
    while caller.f_back is not None and caller.f_globals["__name__"] == "warnings":
        caller = caller.f_back
    if caller.f_globals["__name__"].startswith("moe_mtl."):
        print(f"moe-mtl: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parse(name: str, command: ModuleType, arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog=f"moe-mtl {name}", description=command.__doc__)
    command.configure(parser)
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    overrides, arguments = split_overrides(arguments)
    parsed, unknown = parser.parse_known_args(arguments)
    parser.refuse(unknown)
    if OVERRIDES in parsed:
        setattr(parsed, OVERRIDES, overrides)
    elif overrides:
        raise UsageError(f"unknown option '--{overrides[0][0]}': moe-mtl {name} sets no keys of a recipe")
    return parsed


def _one_line(error: Exception) -> str:
    """What a user needs to know of an error."""
    if isinstance(error, ModuleNotFoundError):
        return f"this needs the package {error.name!r}, which is not installed"
    cause = error.__cause__
    if type(error).__module__ == "huggingface_hub.errors" and isinstance(cause, (ValueError, TypeError)):
        error = cause  # its own message only says in which check the config failed
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
    told = isinstance(error, (ValueError, LookupError, OSError, RuntimeError, UsageError))
    return text if told and text else f"{type(error).__name__}: {text}"
