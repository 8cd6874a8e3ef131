"""Predictions for raw rows, streamed: a file of any size in, a file out that appears whole or not at all.

Rows are computed in batches of the size that evaluation used, so that metrics taken from the file are evaluation's
numbers to the last bit.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from ..data.processor import TabularProcessor
from ..data.sources import FileSource, Source
from ..files import appearing_file, require_writable
from ..hub import resolve
from ..models import AutoModelForMultiTask, MultiTaskModel
from ..naming import nearest
from ..tasks import check_task_names
from .evaluation import TARGETS, model_inputs
from .recipe import RecipeError, TrainSection
from .saved import batch_size_of, recipe_of

SUFFIXES = (".csv", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Prediction:
    """What `predict_file` did: the file, its rows and its columns."""

    path: Path
    rows: int
    columns: list[str]


def open_rows(folder: Path, files: str | Path | Sequence[str | Path], delimiter: str | None = None) -> FileSource:
    """The rows of files for a saved model to answer.

    CSV is cut at `delimiter`, by default as the training data were, but `.tsv` at tabs.

    Raises:
        RecipeError: a delimiter for files that are no CSV.
        DataError, FileNotFoundError: see `FileSource`.
    """
    trained = None
    with suppress(RecipeError):
        trained = recipe_of(folder).data.options.get("delimiter")
    paths = [files] if isinstance(files, (str, Path)) else files
    if any(".tsv" in Path(path).suffixes for path in paths):
        trained = None  # a tab, as the name says
    source = FileSource(files, trained if delimiter is None else delimiter)
    if delimiter is not None and source.kinds != {"csv"}:
        raise RecipeError(f"delimiter: expected none for files that are no CSV, found {delimiter!r} for {files}")
    return source


def predict(
    model: MultiTaskModel,
    processor: TabularProcessor,
    source: Any,
    batch_size: int = TrainSection.eval_batch_size,
    tasks: str | Sequence[str] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Predictions of consecutive rows, in the user's units: see `TabularProcessor.decode` for the columns.

    Args:
        model: in any mode; it computes in evaluation mode.
        processor: the model's.
        source: rows as `TabularProcessor` takes them; no labels needed.
        batch_size: rows per forward pass and per item yielded, but for the last.
        tasks: which; all by default.

    Raises:
        UnknownTaskError, DataError: see `check_task_names`, `TabularProcessor`.
    """
    names = check_task_names(tasks, model.tasks)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(processor, source, batch_size):
            with torch.no_grad():
                logits = model(**model_inputs(batch, device), tasks=names).logits
            yield processor.decode({name: logits[name].float().cpu() for name in names})
    finally:
        model.train(was_training)


def predict_file(
    folder: str | Path,
    source: str | Path,
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    keep: Sequence[str] = (),
    batch_size: int | None = None,
    progress: bool = True,
    delimiter: str | None = None,
) -> Prediction:
    """Predicts the rows of a CSV, Parquet or JSON-lines file with a saved model.

    Numbers are written so that they read back as the same float64; an error in any row leaves no output.

    Args:
        folder: a folder, zoo name or Hub id.
        source: the rows.
        output: `.csv`, `.parquet` or `.jsonl`; replaced if it exists.
        tasks: which; only what they need is loaded.
        keep: columns of the source to carry along, in front; each once.
        batch_size: rows per forward pass; by default what the model was evaluated with.
        progress: show a bar, if the error stream is a terminal.
        delimiter: of CSV; by default that of the training data.

    Raises:
        RecipeError: an output of another kind, a column in `keep` that the source lacks, that a prediction is called or
            that the output cannot hold; see also `open_rows`.
        UnknownTaskError, DataError, FileNotFoundError, OSError: as the names say.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise RecipeError(f"output: expected a name that ends in {', '.join(SUFFIXES)}, found {output.name!r}")
    require_writable(output)
    path = resolve(folder)
    rows = open_rows(path, source, delimiter)
    keep = list(dict.fromkeys(keep))
    for name in keep:
        if name not in rows.columns:
            raise RecipeError(f"keep: {source} has no column {name!r}{nearest(name, rows.columns)}")
    model = AutoModelForMultiTask.from_pretrained(path, tasks=tasks)
    processor = TabularProcessor.from_pretrained(path)
    names = check_task_names(tasks, model.tasks)
    if batch_size is None:
        batch_size = batch_size_of(path)
    clashes = [name for name in keep if any(name == task or name.startswith(f"{task}/") for task in names)]
    if clashes:
        raise RecipeError(f"keep: the column {clashes[0]!r} is what a prediction is called; rename it in {source}")
    types = _kept_types(rows, keep, output.suffix)
    show = progress and sys.stderr.isatty()
    from tqdm import tqdm

    bar = tqdm(total=rows.count_rows() if show else None, unit="row", unit_scale=True, disable=not show)
    chunks = predict(model, processor, rows, batch_size, names)
    tables = (pa.table({name: _column(values) for name, values in chunk.items()}) for chunk in chunks)
    count, columns = 0, []
    with bar, appearing_file(output) as temporary, _Writer(temporary, output.suffix) as writer:
        for table in _with_kept(tables, rows, keep, types):
            writer.write(table)
            columns = table.column_names
            count += table.num_rows
            bar.update(table.num_rows)
    return Prediction(output, count, columns)


def _batches(processor: TabularProcessor, source: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Encoded rows in batches of exactly `batch_size`, whatever pieces the source comes in."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    held: dict[str, Tensor] = {}
    for _, encoded in processor.stream(source, labels=False):
        new = {name: values for name, values in encoded.items() if name not in TARGETS}
        held = {name: torch.cat([held[name], new[name]]) for name in new} if held else new
        rows = len(next(iter(held.values())))
        whole = rows - rows % batch_size
        for start in range(0, whole, batch_size):
            yield {name: values[start : start + batch_size] for name, values in held.items()}
        held = {name: values[whole:] for name, values in held.items()} if whole < rows else {}
    if held:
        yield held


def _kept_types(rows: FileSource, keep: Sequence[str], suffix: str) -> dict[str, pa.DataType]:
    """For Parquet, the one type of each column to carry along: blocks of JSON lines each have their own, CSV is text.

    Raises:
        RecipeError: there is none, or CSV cannot hold it.
    """
    types: dict[str, pa.DataType] = {}
    if not keep or suffix == ".jsonl" or rows.kinds == {"csv"}:
        return types
    for _, batch in rows.batches(keep):
        for name in keep:
            found = pa.schema([(name, batch[name].type)])
            try:
                if suffix == ".csv":
                    pa.csv.write_csv(found.empty_table(), pa.BufferOutputStream())
                else:
                    known = pa.schema([(name, types.get(name, pa.null()))])
                    types[name] = pa.unify_schemas([known, found], promote_options="permissive").types[0]
            except pa.ArrowException:
                what = f"is {types[name]} in some rows and {found.types[0]} in" if types else f"has {found.types[0]} in"
                raise _cannot_hold(name, suffix, f"{what} others") from None
    return types


def _with_kept(
    answers: Iterable[pa.Table], rows: Source, keep: Sequence[str], types: Mapping[str, pa.DataType]
) -> Iterator[pa.Table]:
    """Answers with the columns to carry along in front, cut also where a block of the source ends, as types may."""
    if not keep:
        yield from answers
        return
    blocks = (pa.table(dict(batch)) for _, batch in rows.batches(keep))
    block = pa.table({})
    for table in answers:
        start = 0
        while start < table.num_rows:
            block = block if block.num_rows else next(blocks)
            part = table.slice(start, block.num_rows)
            own = [_cast(name, block[name].slice(0, part.num_rows), types) for name in keep]
            yield pa.table([*own, *part.columns], names=[*keep, *part.column_names])
            block, start = block.slice(part.num_rows), start + part.num_rows


def _cast(name: str, column: pa.ChunkedArray, types: Mapping[str, pa.DataType]) -> pa.ChunkedArray:
    try:
        return column.cast(types[name]) if name in types else column
    except pa.ArrowException as error:
        raise _cannot_hold(name, ".parquet", f"is {types[name]} in some rows: {error}") from None


def _cannot_hold(name: str, suffix: str, why: str) -> RecipeError:
    return RecipeError(f"keep: a {suffix} file cannot hold the column {name!r}, which {why}; write .jsonl instead")


def _column(values: np.ndarray) -> pa.Array:
    # float32 scores become the float64 of the same value, which is what evaluation measures.
    return pa.array(values.astype(np.float64) if values.dtype.kind == "f" else values)


class _Writer:
    """Tables with the same columns to a file, one after another; of Parquet the first one gives the types."""

    def __init__(self, path: Path, suffix: str):
        self.path, self.suffix = path, suffix
        self.parquet: pa.parquet.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        self.file = open(self.path, "xb")
        return self

    def __exit__(self, *error: Any) -> None:
        with self.file:
            if self.parquet is not None:
                self.parquet.close()
            self.file.flush()
            os.fsync(self.file.fileno())

    def write(self, table: pa.Table) -> None:
        if self.suffix == ".jsonl":
            for row in table.to_pylist():
                self.file.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())
        elif self.suffix == ".csv":
            header = pa.csv.WriteOptions(include_header=self.file.tell() == 0)
            pa.csv.write_csv(table, self.file, header)
        else:
            self.parquet = self.parquet or pa.parquet.ParquetWriter(self.file, table.schema)
            self.parquet.write_table(table)
