"""Your own table: CSV, Parquet or JSON-lines files, streamed, with declared or inferred features.

Example, in a recipe:

    data:
      name: table
      path: rows.parquet
      tasks:
        - {name: click, kind: binary}
        - {name: buy, kind: binary, space: click, column: bought, positive: "yes"}
      group_column: user
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import parse_tasks
from .errors import DataError
from .infer import infer_features
from .labels import FIELDS, LabelFitter, task_fields
from .sources import FileSource, SelectedRows, Source
from .splits import PARTS, DataSplits, row_hash
from .values import factorise

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Options:
    """Options of a table of your own.

    Attributes:
        path: the file, files or folder of the rows: `.csv`, `.tsv`, `.jsonl` (each also `.gz`), `.parquet`.
        tasks: fields of `Task`, and in the same mapping those of its label (`column`, `positive`, `classes`, ..., see
            `moe_mtl.data.labels`).
        features: declarations of the inputs; by default inferred, see `infer_features`, and `info["inferred"]` tells
            what was chosen.
        exclude: columns not to infer features from.
        validation_path, test_path: separate files; then `path` holds the training rows alone.
        split_column: the column that says train, validation or test.
        fractions: without either, the shares of train, validation and test; rows are dealt by a hash of their number.
        seed: of that hash.
        group_column: the column that group AUC goes by.
        extra_columns: "ignore" or "error", what the processor does about columns that training did not have.
        missing_values: texts that stand for a missing value.
        delimiter: of CSV.
    """

    path: Paths
    tasks: Sequence[Mapping[str, Any]]
    features: Sequence[Mapping[str, Any]] | None = None
    exclude: Sequence[str] = ()
    validation_path: Paths | None = None
    test_path: Paths | None = None
    split_column: str | None = None
    fractions: Sequence[float] = (0.8, 0.1, 0.1)
    seed: int = 0
    group_column: str | None = None
    extra_columns: str = "ignore"
    missing_values: Sequence[str] = ("",)
    delimiter: str | None = None


def load(options: Options) -> DataSplits:
    """Opens the files, infers what is not declared, and cuts the rows; nothing is held in memory.

    Raises:
        DataError: a file that cannot be read, a missing column, a part without rows, a wrong option, by name.
        FileNotFoundError: no such path.
    """
    source = FileSource(options.path, options.delimiter)
    parts = _parts(source, options)
    fields, labels = _split_fields(options.tasks)
    fitters = [LabelFitter(field, labels[field["name"]], source.columns) for field in fields]
    label_columns = [column for fitter in fitters for column in fitter.label.reads]
    used = [*label_columns, *(name for name in (options.group_column, options.split_column) if name)]
    source.require(list(dict.fromkeys([*used, *options.exclude])), str(options.path))
    for name, part in parts.items():
        part.require(label_columns, f"{name} rows")
    rows = _count(parts, fitters, label_columns, options.missing_values)
    tasks = parse_tasks(
        [field | {"num_outputs": fitter.finish()[1]} for field, fitter in zip(fields, fitters, strict=True)]
    )
    features, notes = options.features, None
    if features is None:
        features, notes = infer_features(parts["train"], [*used, *options.exclude], options.missing_values)
    for name, part in parts.items():
        part.require([str(feature.get("name")) for feature in features], f"{name} rows")
    info = {"name": "table", "licence": "unknown", "sha256": _files_hash(options), "rows": rows}
    return DataSplits(
        **parts,
        features=[dict(feature) for feature in features],
        tasks=tasks,
        labels=labels,
        info=info | ({"inferred": notes} if notes is not None else {}),
        options={
            "group_column": options.group_column,
            "extra_columns": options.extra_columns,
            "missing_values": tuple(options.missing_values),
        },
    )


def _split_fields(tasks: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The fields of `Task`, and the label declarations by task."""
    fields: list[dict[str, Any]] = []
    labels: dict[str, dict[str, Any]] = {}
    if not tasks:
        raise DataError("table: tasks: expected at least one task, found none")
    for task in tasks:
        fields.append(task_fields({key: value for key, value in task.items() if key not in FIELDS}))
        labels[task["name"]] = {key: value for key, value in task.items() if key in FIELDS}
    return fields, labels


def _parts(source: FileSource, options: Options) -> Mapping[str, Source]:
    given = (options.validation_path, options.test_path)
    if (given[0] is None) != (given[1] is None):
        raise DataError("table: expected both validation_path and test_path, found one of them")
    if given[0] is not None:
        if options.split_column is not None:
            raise DataError("table: expected either separate files or a split_column, found both")
        return {"train": source} | {
            name: FileSource(p, options.delimiter) for name, p in zip(PARTS[1:], given, strict=True) if p is not None
        }
    if options.split_column is not None:
        column = options.split_column
        source.require([column], str(options.path))
        return {name: SelectedRows(source, partial(_by_column, column, name), [column]) for name in PARTS}
    shares = options.fractions
    if (
        len(shares) != 3
        or not all(isinstance(s, (int, float)) and s > 0 for s in shares)
        or abs(sum(shares) - 1) > 1e-6
    ):
        raise DataError(f"table: fractions: expected three numbers above 0 that add up to 1, found {list(shares)}")
    bounds = [0.0, shares[0], shares[0] + shares[1], 1.0]
    return {
        name: SelectedRows(source, partial(_by_hash, options.seed, bounds[i], bounds[i + 1]))
        for i, name in enumerate(PARTS)
    }


def _by_hash(seed: int, low: float, high: float, rows: np.ndarray, batch: Mapping[str, Any]) -> np.ndarray:
    share = (row_hash(rows, seed) >> np.uint64(11)).astype(np.float64) / 2**53  # in [0, 1)
    return (share >= low) & (share < high)


def _by_column(column: str, name: str, rows: np.ndarray, batch: Mapping[str, Any]) -> np.ndarray:
    codes, texts = factorise(batch[column], ("",), column)
    parts = [*texts.to_pylist(), None]
    for code in np.unique(codes):
        if parts[code] not in PARTS:
            row = int(rows[int((codes == code).argmax())])
            raise DataError(f"expected one of {', '.join(map(repr, PARTS))}, found {parts[code]!r}", column, row)
    return np.array([part == name for part in parts])[codes]


def _count(
    parts: Mapping[str, Source], fitters: Sequence[Any], columns: Sequence[str], missing: Sequence[str]
) -> dict[str, int]:
    """Rows per part; the fitters see the labels of the training rows on the way."""
    counts = dict.fromkeys(PARTS, 0)
    for name, part in parts.items():
        for rows, batch in part.batches(list(dict.fromkeys(columns)) or part.columns[:1]):
            counts[name] += len(rows)
            if name == "train":
                for fitter in fitters:
                    fitter.update(batch, missing, rows)
    for name, count in counts.items():
        if not count:
            raise DataError(f"table: expected rows for {name}, found none: {counts}")
    return counts


def _files_hash(options: Options) -> str:
    """sha256 over the sha256 of each file, in order."""
    digest = hashlib.sha256()
    for paths in (options.path, options.validation_path, options.test_path):
        if paths is not None:
            for path in FileSource(paths, options.delimiter).paths:
                with open(Path(path), "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
