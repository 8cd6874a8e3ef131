"""Rows from anywhere, read in batches: tables and frames in memory, data sets, CSV, Parquet and JSON-lines files.

A file is never held whole. Every source can be read more than once, and tells for each batch which rows it holds, so
that an error can name the row. CSV columns are read as text: what a column means is declared, not guessed per block.
"""

import gzip
import json
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..naming import nearest
from .errors import DataError
from .values import is_text, plain

BATCH_ROWS = 65_536
BLOCK_BYTES = 1 << 23
MAX_EXACT_INTEGER = 2**53  # of doubles
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "json", ".ndjson": "json"}

Batch = tuple[Sequence[int], Mapping[str, pa.Array | pa.ChunkedArray]]


class Source(ABC):
    """Rows that can be read again and again.

    Attributes:
        columns: names of all columns, in order.
    """

    columns: list[str]

    @abstractmethod
    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        """Yields `(row numbers, {name: column})`, in order, for `columns` only. Row numbers count from 0.

        Raises:
            DataError: a column that cannot be read as one type, a malformed line.
        """

    def require(self, columns: Sequence[str], what: str) -> None:
        """Raises DataError that lists every one of `columns` the source lacks."""
        absent = [name for name in columns if name not in self.columns]
        if absent:
            hint = nearest(absent[0], self.columns)
            raise DataError(f"{what}: missing column{'s' * (len(absent) > 1)} {', '.join(map(repr, absent))}{hint}")

    def count_rows(self) -> int:
        """Number of rows; reads a file once."""
        return sum(len(rows) for rows, _ in self.batches(self.columns[:1]))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows as one table in memory.

        Raises:
            DataError: the batches of a file disagree about a column's type.
        """
        columns = self.columns if columns is None else list(columns)
        tables = [pa.table(dict(batch)) for _, batch in self.batches(columns)]
        try:
            return (
                pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({c: [] for c in columns})
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"the rows change their type within the file: {error}") from None


class TableSource(Source):
    """A pyarrow table."""

    def __init__(self, table: pa.Table):
        repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if repeated:
            raise DataError(f"expected distinct column names, found {', '.join(map(repr, repeated))} more than once")
        for i, field in enumerate(table.schema):
            if pa.types.is_string_view(field.type):  # which Arrow can neither filter nor cut
                table = table.set_column(i, field.with_type(pa.large_string()), table[i].cast(pa.large_string()))
        self.table = table
        self.columns = table.column_names

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        for start in range(0, self.table.num_rows, batch_rows):
            stop = min(start + batch_rows, self.table.num_rows)
            yield range(start, stop), {name: self.table[name].slice(start, stop - start) for name in columns}

    def count_rows(self) -> int:
        return self.table.num_rows


class ColumnsSource(Source):
    """A mapping of names to equally long sequences (lists, arrays, pandas columns); converted as they are read."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = {str(name): column for name, column in data.items()}
        self.columns = list(self.data)
        lengths = {name: len(column) for name, column in self.data.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"expected columns of one length, found {lengths!r:.200}")
        self.num_rows = next(iter(lengths.values()), 0)
        self.converted: dict[str, pa.Array] = {}

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        arrays = {name: self._array(name) for name in columns}
        for start in range(0, self.num_rows, batch_rows):
            stop = min(start + batch_rows, self.num_rows)
            yield range(start, stop), {name: array.slice(start, stop - start) for name, array in arrays.items()}

    def count_rows(self) -> int:
        return self.num_rows

    def _array(self, name: str) -> pa.Array:
        if name not in self.converted:
            try:
                self.converted[name] = plain(_array(self.data[name]))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
                raise _mixed(name, self.data[name], error) from None
        return self.converted[name]


def _array(column: Any) -> pa.Array:
    try:
        return pa.array(column, from_pandas=True)
    except OverflowError:  # an integer above the largest int64
        return pa.array(column, pa.uint64(), from_pandas=True)


def _mixed(name: str, column: Sequence[Any], error: Exception) -> DataError:
    """Which row breaks a column that Arrow cannot give one type."""
    first: type | None = None
    for row, value in enumerate(column):
        if value is None or (isinstance(value, float) and value != value):
            continue
        kind = float if isinstance(value, int) and not isinstance(value, bool) else type(value)
        first = first or kind
        if kind is not first:
            return DataError(f"expected {first.__name__} as in the rows before, found {value!r:.80}", name, row)
    return DataError(f"expected values of one type; {error}", name)


class DatasetSource(Source):
    """A `datasets.Dataset` or `datasets.IterableDataset`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        names = dataset.column_names
        self.columns = list(names if names is not None else next(iter(dataset), {}))

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        start = 0
        for table in self.dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=batch_rows):
            yield range(start, start + table.num_rows), {name: table[name] for name in columns}
            start += table.num_rows


class FileSource(Source):
    """Files of one kind and the same columns, read one after another.

    Args:
        paths: `.csv`, `.tsv` (also `.gz`), `.parquet`, `.pq`, `.jsonl`, `.ndjson` (also `.gz`); a folder stands for
            such files in it.
        delimiter: of CSV; by default a comma, a tab for `.tsv`.
        names: column names of CSV files without a header line.

    Attributes:
        kinds: `csv`, `parquet`, `json`: those that are among the files.

    Raises:
        FileNotFoundError: a path does not exist.
        DataError: an unknown kind of file, an empty file, files with different columns.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], delimiter: str | None = None, names: Sequence[str] | None = None
    ):
        if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n'):
            raise DataError(f"delimiter: expected one ASCII character, no quote or line break, found {delimiter!r}")
        self.delimiter, self.names = delimiter, list(names) if names is not None else None
        self.paths = [
            path for given in ([paths] if isinstance(paths, (str, Path)) else paths) for path in _files(Path(given))
        ]
        if not self.paths:
            raise DataError("expected at least one file, found none")
        self.kinds = {_kind(path) for path in self.paths}
        self.columns = self._columns(self.paths[0])
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise DataError(f"{self.paths[0]}: column {', '.join(map(repr, repeated))} is there more than once")
        for path in self.paths[1:]:
            other = self._columns(path)
            if set(other) != set(self.columns):
                raise DataError(
                    f"{path}: expected the columns of {self.paths[0].name}, found others: "
                    f"{sorted(set(other) ^ set(self.columns))!r:.200}"
                )

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        start = 0
        for path in self.paths:
            for table in _explained(path, self._read(path, list(columns), batch_rows)):
                for chunk in range(0, table.num_rows, batch_rows):
                    part = table.slice(chunk, batch_rows)
                    yield range(start, start + part.num_rows), {name: part[name] for name in columns}
                    start += part.num_rows

    def _columns(self, path: Path) -> list[str]:
        kind = _kind(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if kind == "csv" and self.names is not None:
            return self.names
        try:
            if kind == "csv":
                with pa.csv.open_csv(
                    path, pa.csv.ReadOptions(block_size=BLOCK_BYTES), self._csv_options(path)
                ) as reader:
                    return reader.schema.names
            if kind == "parquet":
                return pa.parquet.read_schema(path).names
        except (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from None
        first = next(_explained(path, _json_tables(path, None)), None)
        if first is None:
            raise DataError(f"{path}: the file has no rows")
        return first.column_names

    def _csv_options(self, path: Path) -> pa.csv.ParseOptions:
        tab = ".tsv" in path.suffixes
        return pa.csv.ParseOptions(delimiter=self.delimiter or ("\t" if tab else ","), newlines_in_values=True)

    def _read(self, path: Path, columns: list[str], batch_rows: int) -> Iterator[pa.Table | pa.RecordBatch]:
        kind = _kind(path)
        if kind == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_rows, columns=columns)
        elif kind == "csv":
            read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, column_names=self.names)
            convert = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(self.columns, pa.string()),
                include_columns=columns,
                strings_can_be_null=False,
            )
            with pa.csv.open_csv(path, read, self._csv_options(path), convert) as reader:
                yield from reader
        else:
            yield from _json_tables(path, columns)


class SelectedRows(Source):
    """The rows of `base` that `selects(row numbers, batch) -> bool [B]` picks; row numbers stay those of `base`.

    Args:
        base: where the rows come from.
        selects: the choice; called with the columns `reads`.
        reads: names of the columns the choice depends on.
    """

    def __init__(
        self, base: Source, selects: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray], reads: Sequence[str] = ()
    ):
        self.base, self.selects, self.reads = base, selects, list(reads)
        self.columns = base.columns

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Batch]:
        wanted = list(dict.fromkeys([*columns, *self.reads]))
        for rows, batch in self.base.batches(wanted, batch_rows):
            numbers = np.asarray(rows)
            mask = self.selects(numbers, batch)
            if mask.any():
                yield numbers[mask], {name: batch[name].filter(pa.array(mask)) for name in columns}


def open_source(rows: Any) -> Source:
    """A source over whatever holds rows.

    Args:
        rows: a `Source`, pyarrow table or record batch, pandas frame, `datasets` data set, path or paths of files,
            list of dicts (a key that some rows lack is missing in them) or dict of columns.

    Raises:
        DataError: anything else.
        FileNotFoundError: a path does not exist.
    """
    if isinstance(rows, Source):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return TableSource(pa.Table.from_batches([rows]))
    if isinstance(rows, pa.Table):
        return TableSource(rows)
    if isinstance(rows, (str, Path)):
        return FileSource(rows)
    if isinstance(rows, Mapping):
        return ColumnsSource(rows)
    if isinstance(rows, (list, tuple)) and not rows:
        raise DataError("expected at least one row, found none")
    if isinstance(rows, (list, tuple)) and all(isinstance(row, (str, Path)) for row in rows):
        return FileSource(rows)
    if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return ColumnsSource({name: [row.get(name) for row in rows] for name in names})
    # A frame or a data set can only be one whose library is loaded: no import is needed to tell.
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        if not rows.columns.is_unique:
            repeated = rows.columns[rows.columns.duplicated()].tolist()
            raise DataError(f"expected distinct column names, found {repeated} more than once")
        return ColumnsSource({name: rows[name] for name in rows.columns})
    if datasets is not None and isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return DatasetSource(rows)
    raise DataError(
        "expected a table, a frame, a data set, paths of .csv, .parquet or .jsonl files, a list of dicts or a dict of "
        f"columns, found {type(rows).__name__}"
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return sorted(p for p in path.iterdir() if _suffix(p) in SUFFIXES) if path.is_dir() else [path]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _kind(path: Path) -> str:
    if _suffix(path) not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)} (csv and jsonl also with .gz)")
    return SUFFIXES[_suffix(path)]


def _explained(path: Path, tables: Iterator[Any]) -> Iterator[Any]:
    """Arrow's own errors, with the file's name."""
    try:
        yield from tables
    except DataError:
        raise
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowKeyError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from None


def _json_tables(path: Path, columns: list[str] | None) -> Iterator[pa.Table]:
    """JSON lines by blocks of whole lines. Each block has its own types; the encoders take them as they come."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            block = b"".join(lines)
            if block.strip():
                yield _json_table(block, columns)


def _json_table(block: bytes, columns: list[str] | None) -> pa.Table:
    def parse(texts: list[pa.Field]) -> pa.Table:
        # Arrow takes texts that look like a date for one; a category must stay the text it was.
        options = pa.json.ParseOptions(explicit_schema=pa.schema(texts), newlines_in_values=False)
        return pa.json.read_json(pa.BufferReader(block), pa.json.ReadOptions(block_size=len(block) + 1), options)

    table = parse([])
    dates = [field.with_type(pa.string()) for field in table.schema if pa.types.is_temporal(field.type)]
    dates += [
        field.with_type(pa.list_(pa.string()))
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_temporal(field.type.value_type)
    ]
    table = parse(dates) if dates else table
    if columns is None:
        return table
    found = {c: table[c] if c in table.column_names else pa.nulls(table.num_rows) for c in columns}
    wrong = [name for name, column in found.items() if not _is_valid(column)]
    suspect = [name for name, column in found.items() if name not in wrong and _may_be_rounded(column)]
    if wrong or suspect:
        # Arrow rounds integers above the largest int64, and any large one beside a fraction or NaN, to doubles; and it
        # loses the null that begins the first list of a block.
        lines = [json.loads(line) for line in block.splitlines() if line.strip()]
        for name in [*wrong, *suspect]:
            values = [line.get(name) for line in lines]
            flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
            if any(isinstance(x, int) and abs(x) > MAX_EXACT_INTEGER for x in flat):
                found[name] = _exact(values, flat)
            elif name in wrong:
                found[name] = pa.array(values, from_pandas=True)
    return pa.table(found)


def _is_valid(column: pa.Array | pa.ChunkedArray) -> bool:
    try:
        column.validate()
    except pa.ArrowInvalid:
        return False
    return True


def _may_be_rounded(column: pa.Array | pa.ChunkedArray) -> bool:
    if pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_floating(column.type):
        return False
    largest = pc.max(pc.abs(column), skip_nulls=True).as_py()  # NaN only where there is nothing else
    return largest is not None and largest >= MAX_EXACT_INTEGER


def _exact(values: list[Any], flat: list[Any]) -> pa.Array:
    """Numbers, some of them large integers, or lists of such, `flat` being all of them, in a type that holds them."""
    integers = [x for x in flat if isinstance(x, int)]
    kind = pa.string()
    if all(x is None or isinstance(x, int) or x != x for x in flat):
        low, high = min(integers), max(integers)
        if low >= -(2**63) and high < 2**63:
            kind = pa.int64()
        elif low >= 0 and high < 2**64:
            kind = pa.uint64()

    def one(x: Any) -> Any:
        return None if x is None or x != x else repr(x) if is_text(kind) else x

    if any(isinstance(value, list) for value in values):
        return pa.array([v if v is None else [one(x) for x in v] for v in values], pa.list_(kind))
    return pa.array([one(x) for x in values], kind)
