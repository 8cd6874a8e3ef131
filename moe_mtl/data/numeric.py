"""Numeric features: scale, default for missing values, and bins for the piecewise-linear encoding.

Real columns are mostly zeros with a long tail (capital gains: 96 % zeros). Ordinary quantiles of such a column are
nearly all zero, and the encoding then knows nothing about the tail. The bins here are the quantiles of the values above
the column's minimum joined with those of its distinct values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import DataError, check_choice, check_int, check_keys
from .values import numbers

NUM_BINS = 128
EXACT_VALUES = 2_000_000
SEED = 20_261
MAX_FLOAT32, MAX_FLOAT64 = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)


class NumericSummary:
    """Moments and a value sample of a stream of numbers.

    Up to `limit` values, everything is exact. Beyond, mean, deviation, minimum and maximum stay exact, and quantiles
    come from a uniform sample of `limit` values: each value draws a random key from a fixed seed and those with the
    smallest keys stay, so the sample does not depend on how the rows are cut into batches.
    """

    def __init__(self, limit: int = EXACT_VALUES):
        self.limit = limit
        self.count, self.mean, self.m2 = 0, 0.0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.parts: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.held = 0
        self.random = np.random.default_rng(SEED)

    def update(self, values: np.ndarray) -> None:
        """Takes float64 values, NaN left out."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        self.minimum, self.maximum = min(self.minimum, values.min()), max(self.maximum, values.max())
        with np.errstate(over="ignore", invalid="ignore"):  # the caller reports what overflows, by name
            mean = values.mean()
            delta, total = mean - self.mean, self.count + len(values)
            self.m2 += float(np.square(values - mean).sum() + delta * delta * self.count * len(values) / total)
            self.mean += delta * len(values) / total
        self.count = total
        self.parts.append(values)
        self.keys.append(self.random.random(len(values)))
        self.held += len(values)
        if self.held > 2 * self.limit:
            self._shrink()

    def _shrink(self) -> None:
        values, keys = np.concatenate(self.parts), np.concatenate(self.keys)
        kept = np.argpartition(keys, self.limit)[: self.limit] if len(keys) > self.limit else slice(None)
        self.parts, self.keys = [values[kept]], [keys[kept]]
        self.held = len(self.parts[0])

    def sample(self) -> np.ndarray:
        """The values, sorted: all of them, or `limit` drawn evenly."""
        if not self.parts:
            return np.zeros(0)
        self._shrink()
        values = np.sort(self.parts[0])
        values[[0, -1]] = self.minimum, self.maximum  # a drawn sample may lack them
        return values

    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation (population); the deviation of a constant column is given as 1."""
        if self.minimum == self.maximum:  # their mean may differ from it by a rounding
            return float(self.minimum), 1.0
        if self.count <= self.limit:  # one sum over the sorted values: the same however the rows were cut
            values = self.sample()
            with np.errstate(over="ignore", invalid="ignore"):
                mean, std = float(values.mean()), float(values.std())
        else:
            mean, std = float(self.mean), math.sqrt(self.m2 / self.count)
        return mean, std if std > 0 else 1.0


def zero_inflated_bins(values: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Bin edges in the values' own units, increasing: at most `num_bins + 1`.

    Each distinct value if they are that few; else quantiles of the values above the minimum joined with quantiles of
    the distinct values, half of the bins each.
    """
    distinct = np.unique(values)
    if len(distinct) <= num_bins + 1:
        return distinct
    above = values[values > distinct[0]]
    shares = np.linspace(0, 1, num_bins // 2 + 1)
    edges = [distinct[:1], np.quantile(distinct, shares)]
    if len(above):
        edges.append(np.quantile(above, shares))
    return np.unique(np.concatenate(edges))


@dataclass(frozen=True)
class NumericFeature:
    """A declared numeric feature.

    Attributes:
        name: the column.
        missing: "default" fills in the training median, "error" refuses a row without the value.
        bins: number of bins at most, edges in the column's units, or None for no bins.
    """

    name: str
    missing: str = "default"
    bins: int | Sequence[float] | None = NUM_BINS

    def __post_init__(self) -> None:
        where = f"feature {self.name!r}"
        check_choice(self.missing, ("default", "error"), f"{where}: missing")
        if isinstance(self.bins, (list, tuple)):
            check_edges(self.bins, f"{where}: bins")
        elif self.bins is not None:
            check_int(self.bins, 2, 10_000, f"{where}: bins")

    def count(self, summary: NumericSummary, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> None:
        """Adds one batch."""
        values = numbers(column, missing, self.name, rows)
        absent = np.isnan(values)
        if self.missing == "error" and absent.any():
            raise DataError("expected a number, found none", self.name, int(rows[int(absent.argmax())]))
        summary.update(values)

    def fit(self, summary: NumericSummary) -> "NumericColumn":
        """Raises DataError where there was no value, or one too large to be averaged."""
        if not summary.count:
            raise DataError("expected at least one value to learn from, found none", self.name)
        mean, std = summary.scale()
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise DataError("expected values whose mean and deviation fit a double, found an overflow", self.name)
        values = summary.sample()
        edges: list[float] | None = None
        if self.bins is not None:
            raw = zero_inflated_bins(values, self.bins) if isinstance(self.bins, int) else np.asarray(self.bins, float)
            edges = float32_edges((raw - mean) / std, self.name)
        return NumericColumn(self.name, mean, std, float(np.median(values)), self.missing, edges)


def float32_edges(edges: np.ndarray, name: str) -> list[float]:
    """Edges that still increase once they are float32; at least two, for a constant column too."""
    with np.errstate(over="ignore"):
        rounded = np.unique(edges.astype(np.float32))
    if not np.isfinite(rounded).all():
        raise DataError("bins: expected edges that fit float32 once scaled, found an overflow", name)
    if len(rounded) < 2:
        rounded = np.array(
            [rounded[0], np.maximum(rounded[0] + 1, np.nextafter(rounded[0], np.float32(np.inf)))], np.float32
        )
    return [float(edge) for edge in rounded]


def check_edges(edges: Any, where: str) -> None:
    """Raises DataError unless there are at least two finite numbers, increasing as float32."""
    if not isinstance(edges, (list, tuple)) or len(edges) < 2:
        raise DataError(f"{where}: expected at least two numbers, found {edges!r:.80}")
    for edge in edges:
        check_number(edge, where)
    with np.errstate(over="ignore", invalid="ignore"):
        rising = np.diff(np.asarray(edges, np.float64).astype(np.float32)) > 0
    if not rising.all() or abs(edges[-1]) > MAX_FLOAT32:
        raise DataError(f"{where}: expected edges that increase, as float32 too, found {edges!r:.80}")


def check_number(value: Any, where: str, low: float = -math.inf) -> None:
    """Raises DataError unless `value` is a finite number above `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_FLOAT64 or value <= low:
        above = f" above {low}" if math.isfinite(low) else ""
        raise DataError(f"{where}: expected a finite number{above}, found {value!r:.80}")


@dataclass(frozen=True)
class NumericColumn:
    """A fitted numeric feature: `(value - mean) / std`, the `default` in place of a missing value."""

    name: str
    mean: float
    std: float
    default: float
    missing: str
    bins: list[float] | None

    kind = "numeric"

    def describe(self) -> dict[str, Any]:
        """What a model's config needs to know."""
        return {"name": self.name, "kind": self.kind, "bins": self.bins}

    def encode(self, column: pa.Array, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """float32 `[B]`, standardised.

        Raises:
            DataError: text, an infinity, a value too far out for float32, or a missing one where that is declared an
                error.
        """
        values = numbers(column, missing, self.name, rows)
        absent = np.isnan(values)
        if absent.any():
            if self.missing == "error":
                raise DataError("expected a number, found none", self.name, int(rows[int(absent.argmax())]))
            values = np.where(absent, self.default, values)
        with np.errstate(over="ignore"):
            scaled = ((values - self.mean) / self.std).astype(np.float32)
        outside = ~np.isfinite(scaled)
        if outside.any():
            row = int(outside.argmax())
            raise DataError(
                f"expected a value that fits float32 once scaled, found {values[row]}", self.name, int(rows[row])
            )
        return scaled

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "mean": self.mean, "std": self.std} | {
            "default": self.default,
            "missing": self.missing,
            "bins": self.bins,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "NumericColumn":
        """Raises DataError for a field of the wrong type, a number that is not finite, bins that do not increase."""
        where = f"feature {fields.get('name')!r}"
        keys = ("name", "kind", "mean", "std", "default", "missing", "bins")
        fields = check_keys(fields, keys, where, keys)
        check_number(fields["mean"], f"{where}: mean")
        check_number(fields["std"], f"{where}: std", 0.0)
        check_number(fields["default"], f"{where}: default")
        check_choice(fields["missing"], ("default", "error"), f"{where}: missing")
        if fields["bins"] is not None:
            check_edges(fields["bins"], f"{where}: bins")
        return cls(*(fields[key] for key in keys if key != "kind"))
