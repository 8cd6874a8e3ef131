"""Printing: aligned tables, JSON, and silence from the libraries below."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..training.saved import plain


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text under their keys: numbers to the right, missing values as `-`."""
    if not rows:
        return "(none)"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    right = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]

    def aligned(line: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([aligned(columns), aligned(["-" * width for width in widths]), *map(aligned, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def print_json(content: Any) -> None:
    """JSON on stdout; what is not a number in JSON (NaN) becomes null."""
    print(json.dumps(plain(content), indent=2, allow_nan=False, default=str))


def metric_rows(metrics: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """task -> metric -> value, as rows of a table; NaN where a metric is not defined, which a record holds as null."""
    return [
        {"task": task, **{name: math.nan if value is None else float(value) for name, value in values.items()}}
        for task, values in metrics.items()
    ]


def say(text: str = "") -> None:
    """What a person should know but a pipe should not get: on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No notes and progress bars of transformers inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
