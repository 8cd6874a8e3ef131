"""Canonical texts and numbers, held to a plain reading of the rule in Python."""

import math
import re
from datetime import date, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_mtl.data import DataError, open_source
from moe_mtl.data.values import FEW, canonical, canonical_list, factorise, numbers


def plain_rule(value, missing=("",)):
    """The documented rule, value by value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        assert value == int(value), "only whole floats are compared here"
        text = str(int(value))
        return None if text in missing else text
    if isinstance(value, int):
        return str(value)
    text = value.strip(" \t\n\r\f\v\u00a0")
    match = re.fullmatch(r"(-?[0-9]+)\.0+", text)
    text = match[1] if match else text
    text = {"-0": "0", "True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}.get(text, text)
    return None if text in missing else text


def read(values, kind=None, missing=("",)):
    column = values if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)
    codes, texts = factorise(column, missing, "x")
    texts = texts.to_pylist()
    return [texts[code] if code >= 0 else None for code in codes]


TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["1", "1.0", "01.00", "-0", "-0.0", " a ", "True", "FALSE", "\u00a0x", "1.0\n", "\x1fx", "a.0", "?"]
    ),
)


@given(st.lists(st.one_of(st.none(), TEXTS), max_size=8), st.sampled_from([1, 10]))
def test_texts_follow_the_rule_alone_and_in_bulk(values, repeats):
    # Few values are read by a path of their own; both must give what the rule says.
    values = values * repeats + [None] * (FEW if repeats > 1 else 0)
    assert read(values, pa.string(), ("", "?")) == [plain_rule(value, ("", "?")) for value in values]


@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=5), st.sampled_from([1, FEW]))
def test_integers_are_exact(values, repeats):
    assert read(values * repeats, pa.int64()) == [plain_rule(value) for value in values * repeats]


@given(st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(-(2**52), 2**52).map(float)), max_size=40))
def test_whole_floats_are_the_integers_they_hold(values):
    assert read(values, pa.float64()) == [plain_rule(value) for value in values]


def test_integers_above_two_to_the_24_stay_apart():
    assert read([2**24, 2**24 + 1, 2**53, 2**53 + 1]) == [
        "16777216",
        "16777217",
        "9007199254740992",
        "9007199254740993",
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize("repeats", [1, FEW])
def test_every_text_type_reads_alike(kind, repeats):
    values = pa.array(["b", None, " a", "b"] * repeats).cast(kind)
    codes, texts = factorise(values, ("",), "x")
    assert [texts[int(c)].as_py() if c >= 0 else None for c in codes] == ["b", None, "a", "b"] * repeats


def test_booleans_dates_and_decimals_have_a_text():
    assert read([True, None, False]) == ["true", None, "false"]
    assert canonical(pa.array([0], pa.date32()), (), "x").to_pylist() == ["1970-01-01"]
    assert canonical(pa.array(["2.00"]).cast(pa.decimal128(5, 2)), (), "x").to_pylist() == ["2"]
    assert canonical(pa.array([0.1], pa.float32()), (), "x").to_pylist() == ["0.1"]


@pytest.mark.parametrize("values", [[[1]], [{"a": 1}], [b"x"]])
def test_values_without_a_text_are_refused(values):
    with pytest.raises(DataError, match=r"column 'x': expected text, numbers or booleans"):
        factorise(pa.array(values), ("",), "x")


def test_an_infinite_category_is_refused():
    with pytest.raises(DataError, match="infinity"):
        factorise(pa.array([math.inf]), ("",), "x")


def test_the_same_floats_from_every_file_are_the_same_categories(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.uniform(1, 10, 300) * 10.0 ** rng.integers(-12, 30, 300)
    values = np.concatenate([large, -large, [1e16, 3.2e17, 1e17 + 16, 2.0**63, 1e20, 1e-5, 1.5e300, 0.1, 5.0]])
    frame = pd.DataFrame({"x": values})
    frame.to_csv(tmp_path / "pandas.csv", index=False)
    pa.csv.write_csv(pa.table(frame), tmp_path / "arrow.csv")
    expected = [str(int(x)) if x == int(x) else np.format_float_positional(x, trim="-") for x in values]
    assert read(values) == expected
    for name in ("pandas.csv", "arrow.csv"):
        ((_, batch),) = open_source(tmp_path / name).batches(["x"])
        assert read(batch["x"]) == expected
    small = np.float32([0.1, 1e-7, 3.4e-20])
    assert read(small) == ["0.1", "0.0000001", "0.000000000000000000034"]


@pytest.mark.parametrize("repeats", [1, FEW])
def test_texts_that_only_look_like_numbers_with_an_exponent_stay(repeats):
    texts = ["1e5", "10e2", "1000", "3E+20", "12e+3", "1e+999", "0x1e-05", "1e+16", "1.5e-07"]
    canon = [*texts[:-2], "10000000000000000", "0.00000015"]
    assert read(texts * repeats) == canon * repeats


@pytest.mark.parametrize("repeats", [1, FEW])
def test_a_moment_has_one_text_whatever_its_unit_and_file(repeats, tmp_path):
    moments = [datetime(2020, 1, 1, 10), datetime(2020, 1, 1), datetime(1999, 12, 31, 23, 59, 59, 500_000)] * repeats
    expected = ["2020-01-01 10:00:00", "2020-01-01", "1999-12-31 23:59:59.5"] * repeats
    frame = pd.DataFrame({"x": moments})
    frame.to_csv(tmp_path / "pandas.csv", index=False)
    pa.csv.write_csv(pa.table(frame), tmp_path / "arrow.csv")
    frame.to_json(tmp_path / "pandas.jsonl", orient="records", lines=True, date_format="iso", date_unit="us")
    for unit in ("ms", "us", "ns"):
        assert read(moments, pa.timestamp(unit)) == expected
    for path in tmp_path.iterdir():
        ((_, batch),) = open_source(path).batches(["x"])
        assert read(batch["x"]) == expected, path
    assert read(moments[:2], pa.timestamp("s")) == expected[:2]
    assert read([date(2020, 1, 1)]) == expected[1:2]
    zoned = ["2020-01-01 00:00:00Z", "2020-01-01T00:00:00.000+00:00", "2020-01-01 00:00:00+01:00", "10:00:00.50"]
    assert read(zoned * repeats) == [zoned[0], zoned[0], "2020-01-01 00:00:00+0100", "10:00:00.5"] * repeats
    assert read(moments[:1], pa.timestamp("ns", "UTC")) == read(moments[:1], pa.timestamp("s", "UTC"))
    assert read([60], pa.duration("s")) == read([60_000_000], pa.duration("us"))


def test_missing_stand_ins_hold_for_every_type():
    assert read([-1, 2], pa.int64(), ("-1",)) == read(["-1", "2"], None, ("-1",)) == read([-1.0, 2], None, ("-1",))
    for values in ([-1, 2], ["-1.0", "2"], [-1.0, 2.0]):
        assert np.isnan(numbers(pa.array(values), ("", "-1"), "x", range(2))).tolist() == [True, False]


def test_numbers_from_every_type():
    expected = [1.0, math.nan, -2.0]
    for values in ([1, None, -2], [1.0, math.nan, -2.0], ["1", " ", " -2.0 "], ["1e0", "nan", "-2"]):
        np.testing.assert_array_equal(numbers(pa.array(values), ("",), "x", range(3)), expected)
    np.testing.assert_array_equal(numbers(pa.array([True, False]), (), "x", range(2)), [1, 0])
    for texts in (["True", None, "False"], ["true", "", " FALSE "]):
        np.testing.assert_array_equal(numbers(pa.array(texts), ("",), "x", range(3)), [1, math.nan, 0])
    np.testing.assert_array_equal(numbers(pa.nulls(2), (), "x", range(2)), [math.nan] * 2)
    np.testing.assert_array_equal(numbers(pa.array(["3"]).dictionary_encode(), (), "x", range(1)), [3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "many"], "column 'x', row 11: expected a number, found the text 'many'"),
        ([1.0, math.inf], "column 'x', row 11: expected a finite number, found inf"),
        (["True", "many"], "column 'x', row 10: expected a number, found the text 'True'"),
        (["1", "-inf"], "column 'x', row 11: expected a finite number, found -inf"),
        ([[1], [2]], "column 'x': expected numbers, found list"),
    ],
)
def test_what_is_no_number_is_refused_by_row(values, message):
    with pytest.raises(DataError) as error:
        numbers(pa.array(values), ("",), "x", range(10, 12))
    assert str(error.value).startswith(message)


def test_declared_values_are_canonical_and_distinct():
    assert canonical_list([1, "b", True, 2.0], "x") == ["1", "b", "true", "2"]
    for values in (["a", "a "], [1, "1.0"], [""]):
        with pytest.raises(DataError, match="distinct"):
            canonical_list(values, "x")
