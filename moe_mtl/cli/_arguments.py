"""Reading a command line: argparse, but strict, with errors of one line that name the nearest option."""

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from ..naming import nearest

OVERRIDES = "overrides"  # where the parsed arguments of a command that takes them hold the keys of a recipe


class UsageError(ValueError):
    """A command line that cannot be followed."""


class HelpPrinted(Exception):  # noqa: N818 - not an error
    """`--help` was answered; there is nothing left to do."""


class Parser(argparse.ArgumentParser):
    """No abbreviations, no exit from within, and docstrings printed as they are."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_json(self) -> None:
        self.add_argument("--json", action="store_true", help="print JSON")

    def add_overrides(self) -> None:
        """Takes `--section.key value` and `--section.key=value`, see `split_overrides`."""
        self.set_defaults(**{OVERRIDES: []})
        self.epilog = "Any key of the recipe: --section.key VALUE, for example --train.epochs 5"

    def error(self, message: str) -> NoReturn:
        raise UsageError(message if message.endswith("?") else f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise HelpPrinted

    def refuse(self, unknown: Sequence[str]) -> None:
        """Raises UsageError where something was not understood."""
        if not unknown:
            return
        first = unknown[0].partition("=")[0]
        if not first.startswith("-"):
            raise UsageError(f"unexpected argument {first!r}; see {self.prog} --help")
        options = [option for option in self._option_string_actions if option.startswith("--")]
        raise UsageError(f"unknown option {first!r}{nearest(first, options)}")


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A type for `add_argument`: one of `names`, else an error that names the nearest."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {text!r}{nearest(text, names)}")
        return text

    return check


def positive(text: str) -> int:
    """A type for `add_argument`: an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options with a dot in their name, with their values, and all other arguments.

    Raises:
        UsageError: such an option without a value.
    """
    overrides, rest = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, value = argument.partition("=")
        if not key.startswith("--") or "." not in key:
            rest.append(argument)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UsageError(f"{key}: expected a value")
            value = queue.pop(0)
        overrides.append((key[2:], value))
    return overrides, rest
