"""The one error of this package, and the strict reading of declarations that raises it."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..naming import nearest


class DataError(ValueError):
    """Rows, columns or declarations that cannot be what they claim to be.

    Attributes:
        column: the column or field concerned, where there is one.
        row: number of the first row concerned, counted from 0 in its source, where there is one.
    """

    def __init__(self, message: str, column: str | None = None, row: int | None = None):
        self.column, self.row = column, row
        where = [f"column {column!r}"] if column is not None else []
        where += [f"row {row}"] if row is not None else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


def check_keys(fields: Any, known: Iterable[str], where: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """`fields` as a dict that has every required key and none beyond `known`.

    Raises:
        DataError: it is no mapping, or has an unknown or lacks a required key.
    """
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: expected a mapping of fields, found {fields!r:.80}")
    known = list(known)
    for key in fields:
        if key not in known:
            raise DataError(f"{where}: unknown field {key!r}{nearest(key, known)}")
    absent = [key for key in required if key not in fields]
    if absent:
        raise DataError(
            f"{where}: expected the fields {', '.join(map(repr, absent))}, found {', '.join(fields) or 'none'}"
        )
    return dict(fields)


def check_choice(value: Any, choices: Iterable[Any], where: str) -> None:
    """Raises DataError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise DataError(f"{where}: expected one of {', '.join(map(repr, choices))}, found {value!r}")


def check_int(value: Any, low: int, high: int, where: str) -> None:
    """Raises DataError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DataError(f"{where}: expected an integer in [{low}, {high}], found {value!r}")
