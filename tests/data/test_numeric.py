"""Scale, median and bins against plain numpy; the reservoir against its own promises."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_mtl.data import DataError
from moe_mtl.data.numeric import NumericColumn, NumericFeature, NumericSummary, zero_inflated_bins


def fit(values, **options):
    feature, summary = NumericFeature("x", **options), NumericSummary()
    feature.count(summary, pa.array(values, pa.float64()), ("",), range(len(values)))
    return feature.fit(summary)


def encode(column, values):
    return column.encode(pa.array(values, pa.float64()), ("",), range(len(values)))


def test_mean_deviation_and_median_are_those_of_training():
    values = np.random.default_rng(0).lognormal(size=500)
    column = fit([*values, None])
    assert column.mean == pytest.approx(values.mean(), rel=1e-14)
    assert column.std == pytest.approx(values.std(), rel=1e-14)
    assert column.default == np.median(values)
    np.testing.assert_allclose(encode(column, values), ((values - values.mean()) / values.std()), rtol=1e-5, atol=1e-6)
    assert encode(column, [None]) == encode(column, [np.median(values)])


def test_bins_of_a_column_of_zeros_with_a_tail_describe_the_tail():
    random = np.random.default_rng(0)
    values = np.where(random.random(20_000) < 0.96, 0, np.round(random.lognormal(8, 1, 20_000)))
    edges = zero_inflated_bins(values, 48)
    tail, distinct = values[values > 0], np.unique(values)
    shares = np.linspace(0, 1, 25)
    expected = sorted({0.0, *np.quantile(tail, shares), *np.quantile(distinct, shares)})
    np.testing.assert_array_equal(edges, expected)
    assert edges[0] == 0
    assert edges[-1] == values.max()
    assert 25 <= len(edges) - 1 <= 49
    assert len(np.unique(np.quantile(values, np.linspace(0, 1, 49)))) < 6, "ordinary quantiles would have missed it"


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60))
def test_bins_always_increase_as_float32(values):
    edges = np.array(fit(values).bins, np.float32)
    assert len(edges) >= 2
    assert (np.diff(edges) > 0).all()


def test_values_too_close_for_float32_share_an_edge():
    values = [1e12 + i * 1e-3 for i in range(5)] + [0.0]
    edges = np.array(fit(values).bins, np.float32)
    assert (np.diff(edges) > 0).all()
    assert len(edges) < len(zero_inflated_bins(np.array(values)))


@pytest.mark.parametrize("value", [0.0, 3.5, -1e30, 1e300])
def test_a_constant_column_is_encoded_as_zero(value):
    column = fit([value] * 3)
    assert column.std == 1
    assert encode(column, [value]) == 0
    assert len(column.bins) == 2


def test_bins_can_be_declared_or_left_out():
    assert fit([1.0, 2.0], bins=None).bins is None
    column = fit([0.0, 10.0], bins=[0, 5, 10])
    assert column.bins == [-1, 0, 1]
    assert len(fit(np.arange(1000.0), bins=4).bins) <= 5


def test_a_sample_does_not_depend_on_the_batches_and_keeps_exact_moments():
    values = np.sort(np.random.default_rng(1).normal(3, 2, 10_000))  # sorted: the first thousand are no fair sample
    summaries = []
    for cut in (10_000, 999, 37):
        summary = NumericSummary(limit=1_000)
        for start in range(0, len(values), cut):
            summary.update(values[start : start + cut])
        summaries.append(summary)
    samples = [summary.sample() for summary in summaries]
    assert len(samples[0]) == 1_000
    for summary, sample in zip(summaries, samples, strict=True):
        np.testing.assert_array_equal(sample, samples[0])
        assert summary.scale() == pytest.approx((values.mean(), values.std()), rel=1e-12)
        assert sample[0] == values.min()
        assert sample[-1] == values.max()
    assert set(samples[0]) <= set(values)
    # A uniform sample: its quartiles are near those of all values (standard error about .05 here).
    np.testing.assert_allclose(
        np.quantile(samples[0], [0.25, 0.5, 0.75]), np.quantile(values, [0.25, 0.5, 0.75]), atol=0.3
    )


def test_up_to_the_limit_everything_is_exact_however_it_is_cut():
    values = np.random.default_rng(2).normal(size=1_000)
    whole, cut = NumericSummary(1_000), NumericSummary(1_000)
    whole.update(values)
    for value in np.split(values, 10):
        cut.update(value)
    assert whole.scale() == cut.scale()
    np.testing.assert_array_equal(whole.sample(), np.sort(values))
    np.testing.assert_array_equal(cut.sample(), np.sort(values))


def test_a_missing_value_can_be_an_error():
    with pytest.raises(DataError, match=r"column 'x', row 1: expected a number, found none"):
        fit([1.0, None], missing="error")
    with pytest.raises(DataError, match=r"column 'x', row 0: expected a number, found none"):
        encode(fit([1.0, 2.0], missing="error"), [math.nan])


def test_values_beyond_float32_are_refused():
    with pytest.raises(DataError, match=r"column 'x', row 1: .*fits float32"):
        encode(fit([1.0, 2.0]), [0.0, 1e300])
    with pytest.raises(DataError, match="overflow"):
        fit([1e308, 1.7e308, -1.7e308])


def test_a_column_without_values_is_refused():
    with pytest.raises(DataError, match=r"column 'x': expected at least one value"):
        fit([None])


@pytest.mark.parametrize(
    "options",
    [{"missing": "zero"}, {"bins": 1}, {"bins": True}, {"bins": [1]}, {"bins": [2, 1]}, {"bins": [0, math.nan]}],
)
def test_a_wrong_declaration_is_refused(options):
    with pytest.raises(DataError, match="feature 'x'"):
        NumericFeature("x", **options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("mean", "1"),
            ("mean", math.nan),
            ("mean", True),
            ("mean", 10**400),
            ("std", 0),
            ("std", -1.0),
            ("default", None),
        ),
        *(
            ("missing", "zero"),
            ("bins", []),
            ("bins", [1, 1]),
            ("bins", [1, 1 + 1e-12]),
            ("bins", [0, 1e39]),
            ("extra", 1),
        ),
    ],
)
def test_a_tampered_file_is_refused(key, value):
    fields = fit([1.0, 2.0]).to_dict()
    assert NumericColumn.from_dict(fields).to_dict() == fields
    with pytest.raises(DataError, match="feature 'x'"):
        NumericColumn.from_dict(fields | {key: value})
