"""Vocabularies and lists of ids against counts and loops in plain Python."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_mtl.data import DataError
from moe_mtl.data.categories import (
    LOOKUP_LIMIT,
    CategoricalColumn,
    CategoricalFeature,
    CategoryCounts,
    ListColumn,
    ListFeature,
)


def fit(feature, values, kind=None):
    counts = CategoryCounts()
    feature.count(counts, pa.array(values, kind), ("",), range(len(values)))
    return feature.fit(counts)


def encode(column, values, kind=None):
    return column.encode(pa.array(values, kind), ("",), range(len(values))).tolist()


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcdefg")), min_size=1), st.integers(1, 3))
def test_ids_follow_frequency_then_value(values, min_count):
    column = fit(CategoricalFeature("x", min_count=min_count), values, pa.string())
    counts = Counter(value for value in values if value is not None)
    expected = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    ids = {value: i + 1 for i, value in enumerate(expected)}
    if None in values:
        ids[None] = len(expected) + 1
    assert column.num_categories == len(ids) + 1
    assert encode(column, values, pa.string()) == [ids.get(value, 0) for value in values]
    assert encode(column, ["unseen"]) == [0]


def test_missing_is_unknown_where_training_had_none():
    assert encode(fit(CategoricalFeature("x"), ["a"]), [None, "a"]) == [0, 1]
    assert encode(fit(CategoricalFeature("x"), ["a", None]), [None, "a"]) == [2, 1]


def test_unseen_and_missing_can_be_errors():
    with pytest.raises(DataError, match=r"column 'x', row 1: expected a value seen in training \('a'\), found 'b'"):
        encode(fit(CategoricalFeature("x", unseen="error"), ["a"]), ["a", "b"])
    column = fit(CategoricalFeature("x", missing="error"), ["a"])
    with pytest.raises(DataError, match=r"column 'x', row 1: expected a value, found none"):
        encode(column, ["a", ""])
    with pytest.raises(DataError, match="row 0: expected a value, found none"):
        fit(CategoricalFeature("x", missing="error"), [None], pa.string())


def test_only_the_most_frequent_values_are_kept():
    column = fit(CategoricalFeature("x", max_categories=1), ["b", "a", "b"])
    assert encode(column, ["b", "a"]) == [1, 0]
    assert column.num_categories == 2


def test_the_lookups_for_few_and_for_many_values_agree():
    values = [f"v{i}" for i in range(LOOKUP_LIMIT + 500)]
    column = fit(CategoricalFeature("x"), values)
    probe = [*values[::-1], "unseen", None]
    at_once = encode(column, probe)
    assert at_once == [encode(column, [value], pa.string())[0] for value in probe]
    assert sorted(at_once[:-2]) == list(range(1, len(values) + 1))
    strict = fit(CategoricalFeature("x", unseen="error"), values)
    with pytest.raises(DataError, match=r"row 1524: .* found 'unseen'"):
        encode(strict, probe)


ROWS = st.lists(
    st.one_of(st.none(), st.lists(st.one_of(st.none(), st.sampled_from("abcd")), max_size=6)), min_size=1, max_size=12
)


@given(ROWS, ROWS, st.sampled_from(["multi_hot", "sequence"]), st.integers(1, 4))
def test_lists_of_ids(training, rows, kind, max_length):
    column = fit(ListFeature("x", kind, max_length=max_length), training, pa.list_(pa.string()))
    counts = Counter(item for row in training for item in row or () if item is not None)
    vocabulary = sorted(counts, key=lambda v: (-counts[v], v))
    ids = {value: i + 1 for i, value in enumerate(vocabulary)}
    expected = []
    for row in rows:
        row_ids = [ids.get(item, 0) for item in row or () if item is not None]
        row_ids = list(dict.fromkeys(row_ids))[:max_length] if kind == "multi_hot" else row_ids[-max_length:]
        expected.append(row_ids + [-1] * (max_length - len(row_ids)))
    assert encode(column, rows, pa.list_(pa.string())) == expected
    assert encode(column, rows, pa.large_list(pa.string())) == expected


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4), min_size=1, max_size=6))
def test_text_with_a_separator_reads_as_a_list(rows):
    feature = ListFeature("x", "sequence", separator=";")
    lists, text = fit(feature, rows), fit(feature, [" ; ".join(row) for row in rows])
    assert text == lists
    assert lists.max_length == max(map(len, rows))
    assert encode(text, ["a;b;", "", None]) == encode(lists, [["a", "b"], [], None])


def test_lists_of_integers_and_of_fixed_size():
    column = fit(ListFeature("x", "multi_hot"), [[3, 3], [3, 5]])
    assert encode(column, [[5, 3], [9, 5]], pa.list_(pa.int32(), 2)) == [[2, 1], [0, 2]]


def test_unseen_items_can_be_errors():
    column = fit(ListFeature("x", "sequence", unseen="error"), [["a"]])
    with pytest.raises(DataError, match=r"column 'x', row 2: .*found 'b'"):
        encode(column, [["a"], [], ["a", "b"]])


def test_what_is_no_list_is_refused():
    with pytest.raises(DataError, match=r"column 'x': expected lists, or text cut by '\|', found int64"):
        fit(ListFeature("x", "sequence"), [1])
    with pytest.raises(DataError, match="column 'x': expected text"):
        fit(ListFeature("x", "sequence"), [[["a"]]])


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CategoricalFeature, {"unseen": "drop"}),
        (CategoricalFeature, {"min_count": 0}),
        (CategoricalFeature, {"missing": "default"}),
        (CategoricalFeature, {"max_categories": 0}),
        (ListFeature, {"kind": "sequence", "pooling": "median"}),
        (ListFeature, {"kind": "sequence", "max_length": 5000}),
        (ListFeature, {"kind": "multi_hot", "separator": ""}),
    ],
)
def test_a_wrong_declaration_is_refused(cls, options):
    with pytest.raises(DataError, match="feature 'x'"):
        cls("x", **options)


@pytest.mark.parametrize(
    "change",
    [
        {"values": ["a", "a"]},
        {"values": "ab"},
        {"values": [1]},
        {"missing_seen": 1},
        {"unseen": "?"},
        {"missing": "?"},
        {"more": 1},
    ],
)
def test_a_tampered_categorical_is_refused(change):
    fields = fit(CategoricalFeature("x"), ["a", "b", None]).to_dict()
    assert CategoricalColumn.from_dict(fields).to_dict() == fields
    with pytest.raises(DataError, match="feature 'x'"):
        CategoricalColumn.from_dict(fields | change)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": None},
        {"max_length": 10**9},
        {"pooling": "?"},
        {"values": ["a", "a"]},
        {"separator": 1},
        {"more": 1},
    ],
)
def test_a_tampered_list_is_refused(change):
    fields = fit(ListFeature("x", "multi_hot"), [["a", "b"]]).to_dict()
    assert ListColumn.from_dict(fields).to_dict() == fields
    with pytest.raises(DataError, match="feature 'x'"):
        ListColumn.from_dict(fields | change)


def test_ids_are_int64():
    column = fit(CategoricalFeature("x"), ["a"])
    assert column.encode(pa.array(["a"]), ("",), range(1)).dtype == np.int64
