"""The user's own table: how rows are dealt, what is inferred, and every wrong option."""

import gzip

import numpy as np
import pandas as pd
import pytest

from moe_mtl.data import DataError, load, open_source
from moe_mtl.tasks import Task

TASKS = [
    {"name": "click", "kind": "binary"},
    {"name": "buy", "kind": "binary", "column": "bought", "positive": "yes", "space": "click", "weight": 2.0},
    {"name": "size", "kind": "multiclass"},
]


def frame(rows=2_000):
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "row": [f"r{i}" for i in range(rows)],
            "age": random.integers(0, 90, rows),
            "city": random.choice(["Bonn", "Ulm"], rows),
            "click": random.integers(0, 2, rows),
            "bought": random.choice(["yes", "no"], rows),
            "size": random.choice(list("SML"), rows),
            "user": random.integers(0, 50, rows),
            "part": random.choice(["train", "validation", "test"], rows, p=[0.5, 0.25, 0.25]),
        }
    )


@pytest.fixture(params=["csv", "csv.gz", "parquet", "jsonl"])
def path(request, tmp_path):
    target = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        frame().to_parquet(target)
    elif request.param == "jsonl":
        frame().to_json(target, orient="records", lines=True)
    else:
        frame().to_csv(target, index=False)
    return str(target)


def rows_of(part):
    return open_source(part).read(["row"])["row"].to_pylist()


def test_fractions_deal_every_row_once_and_always_alike(path):
    splits = load("table", path=path, tasks=TASKS, exclude=["part"])
    dealt = {name: rows_of(part) for name, part in splits.parts().items()}
    assert sorted(row for rows in dealt.values() for row in rows) == sorted(frame().row)
    assert splits.info["rows"] == {name: len(rows) for name, rows in dealt.items()}
    for name, share in zip(dealt, (0.8, 0.1, 0.1), strict=True):
        assert len(dealt[name]) == pytest.approx(share * 2_000, abs=60)  # over 4 standard deviations
    again = load("table", path=path, tasks=TASKS, exclude=["part"])
    assert {name: rows_of(part) for name, part in again.parts().items()} == dealt
    other = load("table", path=path, tasks=TASKS, exclude=["part"], seed=1)
    assert rows_of(other.test) != dealt["test"]


def test_a_split_column_decides(path):
    splits = load("table", path=path, tasks=TASKS, split_column="part", group_column="user")
    for name, part in splits.parts().items():
        assert rows_of(part) == frame().row[frame().part == name].tolist()
    assert [feature["name"] for feature in splits.features] == ["age", "city"]
    assert any(note.startswith("row: left out") for note in splits.info["inferred"])


def test_separate_files(tmp_path):
    for name, start in (("a", 0), ("b", 600), ("c", 900)):
        frame()[start : start + 300].to_csv(tmp_path / f"{name}.csv", index=False)
    splits = load(
        "table",
        path=str(tmp_path / "a.csv"),
        validation_path=str(tmp_path / "b.csv"),
        test_path=[str(tmp_path / "c.csv")],
        tasks=TASKS,
    )
    assert rows_of(splits.validation) == frame().row[600:900].tolist()
    assert rows_of(splits.test) == frame().row[900:1200].tolist()


def test_tasks_and_labels_are_told_apart_and_classes_learned(path):
    splits = load("table", path=path, tasks=TASKS, exclude=["part"], group_column="user")
    assert splits.tasks == [
        Task("click", "binary"),
        Task("buy", "binary", space="click", weight=2.0),
        Task("size", "multiclass", 3),
    ]
    assert splits.labels["buy"] == {"column": "bought", "positive": "yes"}
    processor = splits.fit_processor()
    out = processor(splits.test)
    table = frame().set_index("row").loc[rows_of(splits.test)]
    assert out["labels"]["buy"].tolist() == (table.bought == "yes").astype(float).tolist()
    assert out["labels"]["size"].tolist() == [list("LMS").index(size) for size in table["size"]]
    assert len(set(out["groups"].tolist())) == table.user.nunique()


def test_the_hash_is_that_of_the_content(tmp_path):
    frame().to_csv(tmp_path / "a.csv", index=False)
    frame().to_csv(tmp_path / "b.csv", index=False)
    frame(1_999).to_csv(tmp_path / "c.csv", index=False)
    a, b, c = (load("table", path=str(tmp_path / f"{name}.csv"), tasks=TASKS).info["sha256"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": [{"name": "click", "kind": "binray"}]}, "kind must be one of"),
        ({"tasks": [{"name": "click", "kind": "binary", "colum": "x"}]}, "unknown field 'colum'"),
        ({"tasks": ["click"]}, "tasks: expected a list of mappings"),
        ({"tasks": [{"name": "clck", "kind": "binary"}]}, "missing column 'clck'; did you mean 'click'"),
        ({"fractions": [0.5, 0.5]}, "fractions: expected three numbers"),
        ({"fractions": [0.5, 0.5, 0.5]}, "fractions: expected three numbers"),
        ({"split_column": "none"}, "missing column 'none'"),
        ({"split_column": "city"}, r"column 'city', row \d+: expected one of 'train', 'validation', 'test', found"),
        ({"validation_path": "rows.csv"}, "expected both validation_path and test_path"),
        ({"group_column": "none"}, "missing column 'none'"),
        ({"exclude": ["cty"]}, "missing column 'cty'; did you mean 'city'"),
        ({"features": [{"name": "agee", "kind": "numeric"}]}, "train rows: missing column 'agee'; did you mean 'age'"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    frame(200).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=message):
        load("table", **{"path": str(tmp_path / "rows.csv"), "tasks": TASKS, **options})


def test_a_part_without_rows_is_refused(tmp_path):
    frame(2).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="expected rows for"):
        load("table", path=str(tmp_path / "rows.csv"), tasks=TASKS[:1])


def test_a_cut_off_file_is_refused(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(frame().to_csv(index=False).encode())[:-500])
    with pytest.raises(DataError, match=r"rows.csv.gz"):
        load("table", path=str(tmp_path / "rows.csv.gz"), tasks=TASKS)
