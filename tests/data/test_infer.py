"""The rule that guesses kinds, one column per clause."""

import datetime

import numpy as np
import pandas as pd
import pytest

from moe_mtl.data import DataError, infer_features

ROWS = 200
COLUMNS = {
    "empty": ([None] * ROWS, None),
    "constant": ([3] * ROWS, None),
    "list": ([["a"], ["b", "c"]] * (ROWS // 2), "multi_hot"),
    "flag": ([True, False] * (ROWS // 2), "categorical"),
    "few_integers": ([i % 32 for i in range(ROWS)], "categorical"),
    "many_integers": ([i % 33 for i in range(ROWS)], "numeric"),
    "integers_with_gaps": ([None, *[float(i % 5) for i in range(ROWS - 1)]], "categorical"),
    "floats": ([i % 5 + 0.5 for i in range(ROWS)], "numeric"),
    "integers_as_text": ([str(i % 40) for i in range(ROWS)], "numeric"),
    "text": (["a", "b"] * (ROWS // 2), "categorical"),
    "codes": ([f"c{i % 100}" for i in range(ROWS)], "categorical"),
    "identifier": ([f"id{i}" for i in range(ROWS)], None),
    "date": ([datetime.date(2020, 1, 1 + i % 9) for i in range(ROWS)], "categorical"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_each_clause_of_the_rule(name):
    features, notes = infer_features({name: COLUMNS[name][0], "other": np.arange(ROWS) / 7})
    assert {f["name"]: f["kind"] for f in features}.get(name) == COLUMNS[name][1]
    assert notes[0].startswith(f"{name}: {COLUMNS[name][1] or 'left out'} (")


def test_a_csv_file_is_judged_as_its_frame(tmp_path):
    frame = pd.DataFrame({name: values for name, (values, _) in COLUMNS.items() if name != "list"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert infer_features(tmp_path / "a.csv")[0] == infer_features(frame)[0]


def test_excluded_columns_are_not_looked_at():
    assert infer_features({"a": [1, 2], "b": [object(), 2]}, exclude=["b"])[0] == [{"name": "a", "kind": "categorical"}]


def test_nothing_of_use_is_an_error_that_tells_why():
    with pytest.raises(DataError, match=r"a: left out \(1 distinct value\)"):
        infer_features({"a": [1, 1]})
    with pytest.raises(DataError, match="none beside the labels"):
        infer_features({"a": [1, 2]}, exclude=["a"])


def test_the_nameless_index_that_pandas_writes_is_left_out(tmp_path):
    pd.DataFrame({"a": range(40)}).to_csv(tmp_path / "a.csv")
    features, notes = infer_features(tmp_path / "a.csv")
    assert features == [{"name": "a", "kind": "numeric"}]
    assert notes[0] == "the column without a name: left out (it has no name)"


def test_texts_that_look_like_lists_are_told_how_to_be_declared():
    rows = {
        "tags": ["a|b", "b", "a|c", None, "c|a"],
        "city": ["Rome", "Oslo", "Rome", "Lima, Peru", "Oslo"],
        "free": ["x; y", "y; z", "z; w", "w; v", "u"],
    }
    features, notes = infer_features(rows)
    assert [feature["kind"] for feature in features] == ["categorical"] * 3
    assert notes == [
        "tags: categorical (4 distinct values; if they are lists, declare it multi_hot with the separator '|')",
        "city: categorical (3 distinct values)",
        "free: categorical (5 distinct values; if they are lists, declare it multi_hot with the separator ';')",
    ]
