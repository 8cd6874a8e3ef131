"""MultiTab-Bench: the Gram matrix of the weights, the polynomials, and the correlations that cannot be."""

import numpy as np
import pytest

from moe_mtl.data import DataError, load
from moe_mtl.data.multitab_bench import task_weights


@pytest.mark.parametrize(("tasks", "correlation"), [(7, 0.4), (3, -0.5), (4, 1.0), (1, 0.3), (2, -1.0), (5, 0.0)])
def test_the_weights_have_the_given_cosines(tasks, correlation):
    w_TD = task_weights(tasks, 8, correlation, np.random.default_rng(0))
    expected = np.full((tasks, tasks), correlation)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(w_TD @ w_TD.T, expected, atol=1e-7)


def test_labels_are_polynomials_of_one_projection():
    splits = load("multitab-bench", degrees=[1, 3], num_features=4, noise=0.0, num_rows=2_000)
    x = np.stack([splits.train[f"x{i}"].to_numpy() for i in range(4)], 1)
    y1, y2 = splits.train["y1"].to_numpy(), splits.train["y2"].to_numpy()
    w1 = np.linalg.lstsq(x, y1, rcond=None)[0]
    np.testing.assert_allclose(x @ w1, y1, atol=1e-10)
    assert np.linalg.norm(w1) == pytest.approx(1)
    # s + s^2 + s^3 rises with s, so it can be inverted; what comes out must be a projection on a unit vector.
    grid = np.linspace(-8, 8, 2_000_001)
    s = np.interp(y2, grid + grid**2 + grid**3, grid)
    w2 = np.linalg.lstsq(x, s, rcond=None)[0]
    np.testing.assert_allclose(x @ w2, s, atol=1e-4)
    assert w1 @ w2 == pytest.approx(0.4, abs=1e-3)


def test_with_degree_one_the_labels_have_the_correlation_of_the_weights():
    splits = load("multitab-bench", degrees=[1] * 5, num_rows=50_000)
    labels = np.stack([splits.train[f"y{t}"].to_numpy() for t in range(1, 6)])
    off = np.corrcoef(labels)[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(off, 0.4, atol=0.03)


def test_the_defaults_give_the_correlations_measured_elsewhere():
    splits = load("multitab-bench", num_rows=50_000)
    labels = np.stack([splits.train[f"y{t}"].to_numpy() for t in range(1, 8)])
    off = np.corrcoef(labels)[~np.eye(7, dtype=bool)]
    assert off.mean() == pytest.approx(0.23, abs=0.05)
    assert splits.info["rows"] == {"train": 35_000, "validation": 7_500, "test": 7_500}


def test_a_fitted_processor_standardises_every_label():
    splits = load("multitab-bench", num_rows=2_000)
    for labels in splits.fit_processor()(splits.train)["labels"].values():
        assert labels.mean().abs() < 1e-4
        assert abs(labels.std(correction=0) - 1) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correlation": -0.17}, r"correlation: expected a number in \[-0.1667, 1\] for 7 tasks, found -0.17"),
        ({"correlation": 1.01}, "correlation"),
        ({"num_features": 6}, "num_features: expected at least one per task, 7, found 6"),
        ({"degrees": []}, "degrees"),
        ({"degrees": [0]}, "degrees"),
        ({"num_rows": 2}, "at least one row"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        load("multitab-bench", **options)
