"""Predictions for raw rows, streamed: a file of any size in, a file out that appears whole or not at all.

Rows are computed in batches of the size that evaluation used, so that metrics taken from the file are evaluation's
numbers to the last bit.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from ..data.sources import BATCH_ROWS, open_source
from ..hub import resolve
from ..models import AutoModelForMultiTask, MultiTaskModel
from ..naming import nearest
from ..tasks import check_task_names
from .evaluation import TARGETS, model_inputs
from .recipe import RecipeError, TrainSection
from .saved import batch_size_of

SUFFIXES = (".csv", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Prediction:
    """What `predict_file` did: the file, its rows and its columns."""

    path: Path
    rows: int
    columns: list[str]


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
) -> Prediction:
    """Predicts the rows of a CSV, Parquet or JSON-lines file with a saved model.

    Numbers are written so that they read back as the same float64; an error in any row leaves no output.

    Args:
        folder: a folder, zoo name or Hub id.
        source: the rows.
        output: `.csv`, `.parquet` or `.jsonl`; replaced if it exists.
        tasks: which; only what they need is loaded.
        keep: columns of the source to carry along, in front.
        batch_size: rows per forward pass; by default what the model was evaluated with.
        progress: show a bar, if the error stream is a terminal.

    Raises:
        RecipeError: an output of another kind, a column in `keep` that the source lacks or that a prediction is called.
        UnknownTaskError, DataError, FileNotFoundError, OSError: as the names say.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise RecipeError(f"output: expected a name that ends in {', '.join(SUFFIXES)}, found {output.name!r}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {output.parent}")
    path = resolve(folder)
    rows = open_source(source)
    for name in keep:
        if name not in rows.columns:
            raise RecipeError(f"keep: {source} has no column {name!r}{nearest(name, rows.columns)}")
    model = (
        AutoModelForMultiTask.from_pretrained(path, tasks=tasks)
        if tasks is not None
        else AutoModelForMultiTask.from_pretrained(path)
    )
    processor = TabularProcessor.from_pretrained(path)
    names = check_task_names(tasks, model.tasks)
    if batch_size is None:
        batch_size = batch_size_of(path)
    clashes = [name for name in keep if any(name == task or name.startswith(f"{task}/") for task in names)]
    if clashes:
        raise RecipeError(f"keep: the column {clashes[0]!r} is what a prediction is called; rename it in {source}")
    show = progress and sys.stderr.isatty()
    from tqdm import tqdm

    bar = tqdm(total=rows.count_rows() if show else None, unit="row", unit_scale=True, disable=not show)
    kept = _kept(rows, list(keep), batch_size)
    count, columns = 0, []
    with bar, _appearing(output) as temporary, _Writer(temporary, output.suffix) as writer:
        for chunk in predict(model, processor, rows, batch_size, names):
            table = pa.table({name: _column(values) for name, values in chunk.items()})
            if keep:
                own = next(kept)
                for i, name in enumerate(keep):
                    table = table.add_column(i, name, own[name])
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


def _kept(rows: Any, columns: list[str], batch_size: int) -> Iterator[pa.Table]:
    """The columns to carry along, in the same batches."""
    held: pa.Table | None = None
    for _, batch in rows.batches(columns, BATCH_ROWS) if columns else ():
        new = pa.table(dict(batch))
        held = new if held is None else pa.concat_tables([held, new], promote_options="permissive")
        while held.num_rows >= batch_size:
            yield held.slice(0, batch_size)
            held = held.slice(batch_size)
    if held is not None and held.num_rows:
        yield held


def _column(values: np.ndarray) -> pa.Array:
    # float32 scores become the float64 of the same value, which is what evaluation measures.
    return pa.array(values.astype(np.float64) if values.dtype.kind == "f" else values)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name when the block ends well, and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class _Writer:
    """Tables to a file, one after another; the first one gives the columns."""

    def __init__(self, path: Path, suffix: str):
        self.path, self.suffix = path, suffix
        self.file: Any = None
        self.schema: pa.Schema | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, table: pa.Table) -> None:
        if self.suffix == ".jsonl":
            self.file = self.file or open(self.path, "x", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            for row in table.to_pylist():
                self.file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            return
        if self.file is None:
            self.schema = table.schema
            make = pa.csv.CSVWriter if self.suffix == ".csv" else pa.parquet.ParquetWriter
            self.file = make(self.path, self.schema)
        self.file.write_table(table.cast(self.schema))  # a later batch may be guessed to be of another type
