"""What loading a data set returns, and how rows are dealt to its parts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .sources import Source

if TYPE_CHECKING:
    from ..tasks import Task
    from .processor import TabularProcessor

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSplits:
    """A data set, cut into three, with all that a processor needs to be fitted.

    Attributes:
        train, validation, test: the rows, in memory or streamed from files.
        features: declarations of the inputs, or None to have them inferred.
        tasks: what is predicted.
        labels: how each task's label is read, by task, see `moe_mtl.data.labels`.
        info: name, licence, sha256 of the content, rows per part, and what else is worth telling.
        options: further arguments of `TabularProcessor.fit`.
    """

    train: pa.Table | Source
    validation: pa.Table | Source
    test: pa.Table | Source
    features: list[dict[str, Any]] | None
    tasks: "list[Task]"
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def fit_processor(self) -> "TabularProcessor":
        """A processor that has learnt from the training rows."""
        from .processor import TabularProcessor

        return TabularProcessor.fit(self.train, self.tasks, self.features, labels=self.labels, **self.options)

    def parts(self) -> dict[str, pa.Table | Source]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def sha256_tenth(num_rows: int) -> np.ndarray:
    """int64 `[num_rows]` in 0..9: sha256 of the decimal row number, first 8 hex digits, as an integer, modulo 10."""
    return np.array([int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16) % 10 for i in range(num_rows)], np.int64)


def row_hash(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """uint64 per row number, evenly spread: the splitmix64 finaliser (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64(seed % 2**32 + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def take(table: pa.Table, part: np.ndarray) -> dict[str, pa.Table]:
    """The parts of a table, by name: `part` int `[N]` holds 0 for train, 1 for validation, 2 for test."""
    return {name: table.take(pa.array(np.flatnonzero(part == i))) for i, name in enumerate(PARTS)}


def sizes(parts: Mapping[str, pa.Table]) -> dict[str, int]:
    """Rows per part."""
    return {name: len(table) for name, table in parts.items()}


def content_hash(*arrays: np.ndarray) -> str:
    """sha256 over the bytes of arrays, in little-endian order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
