"""The same rows whatever they come from, streamed in batches, with every breakage named."""

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_mtl.data import DataError, open_source, sources
from moe_mtl.data.sources import FileSource, SelectedRows
from moe_mtl.data.values import factorise

FRAME = pd.DataFrame(
    {"n": [1, 2, None, 4], "t": ["x", "a,b", None, 'q"\n'], "b": [True, False, None, True], "d": ["2020-01-01"] * 4}
)


def texts(source):
    out = {}
    for _, batch in source.batches(source.columns):
        for name, column in batch.items():
            codes, values = factorise(column, ("",), name)
            out.setdefault(name, []).extend(values[int(c)].as_py() if c >= 0 else None for c in codes)
    return out


def make(kind, folder):
    path = folder / f"rows.{kind}"
    if kind in ("csv", "csv.gz"):
        FRAME.to_csv(path, index=False)
    elif kind == "tsv":
        FRAME.to_csv(path, index=False, sep="\t")
    elif kind == "parquet":
        FRAME.to_parquet(path)
    elif kind in ("jsonl", "jsonl.gz"):
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path, "wt") as file:
            file.writelines(
                json.dumps(row) + "\n" for row in FRAME.astype(object).where(FRAME.notna(), None).to_dict("records")
            )
    elif kind == "frame":
        return FRAME
    elif kind == "table":
        return pa.Table.from_pandas(FRAME)
    elif kind == "batch":
        return pa.RecordBatch.from_pandas(FRAME)
    elif kind == "dataset":
        return datasets.Dataset.from_pandas(FRAME)
    elif kind == "iterable":
        return datasets.Dataset.from_pandas(FRAME).to_iterable_dataset()
    elif kind == "rows":
        return FRAME.to_dict("records")
    elif kind == "columns":
        return FRAME.to_dict("list")
    return path


KINDS = [
    "csv",
    "csv.gz",
    "tsv",
    "parquet",
    "jsonl",
    "jsonl.gz",
    "frame",
    "table",
    "batch",
    "dataset",
    "iterable",
    "rows",
    "columns",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows_twice(kind, tmp_path):
    source = open_source(make(kind, tmp_path))
    expected = {
        "n": ["1", "2", None, "4"],
        "t": ["x", "a,b", None, 'q"'],
        "b": ["true", "false", None, "true"],
        "d": ["2020-01-01"] * 4,
    }
    assert set(source.columns) == set(expected)
    assert texts(source) == expected
    assert texts(source) == expected
    assert source.count_rows() == 4


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "frame", "dataset", "rows"])
def test_batches_are_bounded_and_numbered(kind, tmp_path):
    source = open_source(make(kind, tmp_path))
    batches = [(list(rows), len(batch["n"])) for rows, batch in source.batches(["n"], batch_rows=3)]
    assert batches == [([0, 1, 2], 3), ([3], 1)]


def test_a_file_of_many_blocks_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 12)
    rows = 5_000
    i = np.arange(rows)
    frame = pd.DataFrame({"i": i, "f": np.where(i < 4_000, i, i + 0.5)})
    frame.to_csv(tmp_path / "a.csv", index=False)
    # In the first blocks of the JSON file every f is whole; the type of the column changes on the way.
    text = "".join(
        f'{{"i": {i}, "f": {int(f) if f == int(f) else f}}}\n' for i, f in zip(frame.i, frame.f, strict=True)
    )
    (tmp_path / "a.jsonl").write_text(text)
    for path in (tmp_path / "a.csv", tmp_path / "a.jsonl"):
        batches = list(open_source(path).batches(["i", "f"]))
        assert len(batches) > 5
        assert [r for held, _ in batches for r in held] == list(range(rows))
        values = np.concatenate([np.array([float(v) for v in batch["f"].to_pylist()]) for _, batch in batches])
        np.testing.assert_array_equal(values, frame.f)
    np.testing.assert_array_equal(open_source(tmp_path / "a.jsonl").read()["f"].to_numpy(), frame.f)


def test_several_files_and_folders_follow_each_other(tmp_path):
    for i in range(3):
        pq.write_table(pa.table({"x": [i, i]}), tmp_path / f"part-{i}.parquet")
    (tmp_path / "notes.txt").write_text("not rows")
    source = open_source(tmp_path)
    assert source.read()["x"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert [r for rows, _ in source.batches(["x"]) for r in rows] == list(range(6))
    assert open_source([str(tmp_path / "part-2.parquet"), tmp_path / "part-0.parquet"]).read()["x"].to_pylist() == [
        2,
        2,
        0,
        0,
    ]


def test_selected_rows_keep_their_numbers():
    source = SelectedRows(open_source({"x": list(range(10))}), lambda rows, batch: rows % 3 == 1)
    batches = list(source.batches(["x"], batch_rows=5))
    assert [list(rows) for rows, _ in batches] == [[1, 4], [7]]
    assert [batch["x"].to_pylist() for _, batch in batches] == [[1, 4], [7]]


def test_a_file_without_header_and_another_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("1;x\n2;y\n")
    assert texts(FileSource(tmp_path / "a.csv", ";", ["n", "t"])) == {"n": ["1", "2"], "t": ["x", "y"]}


def test_a_key_that_some_rows_lack_is_missing_in_them(tmp_path):
    rows = [{"a": 1}, {"a": 2, "b": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (open_source(rows), open_source(tmp_path / "a.jsonl")):
        assert texts(source) == {"a": ["1", "2"], "b": [None, "x"]}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2**63 + 2**40 + i % 40 for i in range(80)], pa.uint64()),
        ([2**60 + i % 7 if i else float("nan") for i in range(80)], pa.int64()),
        ([2**60 + i % 7 if i else None for i in range(80)], pa.int64()),
        ([-(2**63) - 5 + i % 7 for i in range(80)], pa.string()),
        ([2**70 + i % 7 for i in range(80)], pa.string()),
        ([2**60 + i % 7 if i else 1.5 for i in range(80)], pa.string()),
        ([i * 2.0**60 + 0.5 for i in range(80)], pa.float64()),
    ],
)
def test_large_integers_of_json_lines_stay_apart(values, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps({"id": value, "list": [value, value]}) for value in values) + "\n")
    source = FileSource(path)
    ((_, batch),) = source.batches(["list", "id"])
    assert batch["id"].type == kind
    expected = [str(value) if isinstance(value, int) else None for value in values]
    for column, repeats in ((batch["id"], 1), (batch["list"].combine_chunks().flatten(), 2)):
        codes, found = factorise(column, ("",), "id")
        found = [found[int(code)].as_py() if code >= 0 else None for code in codes]
        for i, text in enumerate(found):
            value = values[i // repeats]
            assert text == expected[i // repeats] or isinstance(value, float)
        assert len(set(found)) == len({str(value) for value in values})


@given(
    st.lists(
        st.one_of(
            st.just({}),
            st.fixed_dictionaries(
                {"x": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(-3, 3)), max_size=3))}
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_lists_of_json_lines_keep_their_nulls(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row | {"n": 1}) + "\n" for row in rows))
        ((_, batch),) = FileSource(path).batches(["x"])
    assert batch["x"].to_pylist() == [row.get("x") for row in rows]


def test_integers_of_rows_in_memory_may_need_64_bits_without_a_sign():
    rows = [{"id": 2**63 + 2**40 + i} for i in range(40)] + [{"id": None}]
    assert texts(open_source(rows))["id"] == [str(2**63 + 2**40 + i) for i in range(40)] + [None]
    with pytest.raises(DataError, match="column 'id'"):
        texts(open_source([{"id": 2**70}]))


def test_views_of_texts_can_be_cut_and_chosen_from():
    values = [f"value {i % 3}" for i in range(100)]
    source = open_source(pa.table({"x": pa.array(values, pa.string_view())}))
    even = SelectedRows(source, lambda rows, _: rows % 2 == 0)
    assert texts(even)["x"] == values[::2]


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", "ß"])
def test_what_cannot_cut_csv_is_refused(delimiter, tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="delimiter: expected one ASCII character"):
        FileSource(tmp_path / "rows.csv", delimiter)


def test_require_lists_every_missing_column():
    with pytest.raises(DataError, match=r"rows: missing columns 'b', 'c'"):
        open_source({"a": [1]}).require(["a", "b", "c"], "rows")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.parquet", "", "a.parquet: the file is empty"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", "a.jsonl: the file has no rows"),
        ("a.csv", "x,x\n1,2\n", "column 'x' is there more than once"),
        ("a.csv", "x,y\n1,2\n3\n", "a.csv: .*Expected 2 columns, got 1"),
        ("a.parquet", "not parquet at all", "a.parquet: "),
        ("a.jsonl", '{"x": 1\n', "a.jsonl: JSON parse error"),
        ("a.jsonl", '{"x": 1}\n{"x": "a"}\n', "changed from number to string"),
        ("a.csv.gz", "not gzip", "a.csv.gz: "),
        ("a.xlsx", "x", "expected a file ending in"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        texts(open_source(tmp_path / name))


def test_damaged_gzip_is_named(tmp_path):
    packed = bytearray(gzip.compress(b'{"x": 1}\n'))
    packed[10] = 7  # no kind of block
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: .*invalid block type"):
        texts(open_source(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("content", ["größe,b\n1,2\n", "a,b\nä,2\n"])
def test_text_that_is_not_utf8_is_refused(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"(?i)x\.csv: .*utf-?8"):
        texts(open_source(tmp_path / "x.csv"))


def test_files_with_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("y\n1\n")
    with pytest.raises(DataError, match=r"b.csv: expected the columns of a.csv"):
        open_source(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        open_source(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one row"),
        (3, "expected a table"),
        ([1, 2], "expected a table"),
        ({"a": [1], "b": [1, 2]}, "expected columns of one length"),
        ({"a": [1, "x"]}, r"column 'a', row 1: expected float as in the rows before, found 'x'"),
        ([{"a": None}, {"a": "x"}, {"a": 2}], r"column 'a', row 2: expected str as in the rows before, found 2"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "more than once"),
        (pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), "more than once"),
    ],
)
def test_what_is_no_table_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        texts(open_source(rows))
