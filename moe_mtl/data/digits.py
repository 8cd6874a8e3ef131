"""Digits: 1,797 scanned handwritten digits of 8 x 8 pixels, as shipped with scikit-learn; nothing to download.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(doi:10.24432/C50P49, CC BY 4.0), the test part. Four tasks that share one picture: which digit, odd or even, at least
5, how many holes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..tasks import Task
from .errors import DataError
from .splits import DataSplits, content_hash, sizes, take

TASKS = {
    "digit": Task("digit", "multiclass", 10),
    "parity": Task("parity", "binary"),
    "at_least_5": Task("at_least_5", "binary"),
    "holes": Task("holes", "multiclass", 3),
}
# Closed loops of the printed digit: 0, 6 and 9 have one, 8 has two. 4 counts as open, as most writers here leave it.
HOLES = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)


@dataclass(frozen=True)
class Options:
    """Options of the digits.

    Attributes:
        tasks: which of digit, parity (1: odd), at_least_5, holes.
    """

    tasks: tuple[str, ...] = tuple(TASKS)


def load(options: Options) -> DataSplits:
    """Pixels p00 to p77 (row, column; 0 to 16) and labels; 60 / 20 / 20 within each digit, by a hash of the row number.

    Raises:
        DataError: an unknown task.
    """
    from sklearn.datasets import load_digits

    if unknown := [task for task in options.tasks if task not in TASKS]:
        raise DataError(f"digits: unknown task {', '.join(map(repr, unknown))}; known: {', '.join(TASKS)}")
    pixels, digit = load_digits(return_X_y=True)
    pixels, digit = pixels.astype(np.float64), digit.astype(np.int64)
    columns = {f"p{i // 8}{i % 8}": pixels[:, i] for i in range(64)}
    features = [{"name": name, "kind": "numeric", "bins": None} for name in columns]
    labels = {
        "digit": digit,
        "parity": digit % 2,
        "at_least_5": (digit >= 5).astype(np.int64),
        "holes": np.array(HOLES)[digit],
    }
    parts = take(pa.table(columns | labels), stratified(digit))
    info = {"name": "digits", "licence": "CC-BY-4.0", "sha256": content_hash(pixels, digit), "rows": sizes(parts)}
    return DataSplits(**parts, features=features, tasks=[TASKS[task] for task in options.tasks], info=info)


def stratified(digit: np.ndarray) -> np.ndarray:
    """0, 1 or 2 per row: of each digit, ordered by sha256 of the row number, 60 % train, 20 % validation, 20 % test."""
    order = np.array(sorted(range(len(digit)), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest()))
    part = np.empty(len(digit), np.int64)
    for value in range(10):
        rows = order[digit[order] == value]
        part[rows] = np.searchsorted(np.array([0.6, 0.8]) * len(rows), np.arange(len(rows)), side="right")
    return part
