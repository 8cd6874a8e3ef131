import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from moe_mtl.cards.bootstrap import auc_statistic, mean_statistic, paired_bootstrap


@pytest.fixture
def rows():
    generator = np.random.default_rng(3)
    labels = (generator.random(400) < 0.2).astype(float)
    scores = np.stack([labels + generator.normal(size=400) for _ in range(3)])
    return labels, np.round(scores, 1)  # rounding makes ties


def test_weighted_auc_is_that_of_repeated_rows(rows):
    labels, scores = rows
    statistic = auc_statistic(labels, scores)
    generator = np.random.default_rng(0)
    for _ in range(5):
        drawn = generator.integers(400, size=400)
        expected = [roc_auc_score(labels[drawn], s[drawn]) for s in scores]
        np.testing.assert_allclose(statistic(np.bincount(drawn, minlength=400)), expected, rtol=1e-12)


def test_means(rows):
    labels, scores = rows
    hits = (scores > 0.5) == labels
    drawn = np.random.default_rng(0).integers(400, size=400)
    counts = np.bincount(drawn, minlength=400)
    expected = [accuracy_score(labels[drawn], (s > 0.5)[drawn]) for s in scores]
    np.testing.assert_allclose(mean_statistic(hits)(counts), expected)
    squared = (scores - labels) ** 2
    np.testing.assert_allclose(mean_statistic(squared, root=True)(counts), np.sqrt(squared[:, drawn].mean(1)))


def test_bootstrap_is_paired(rows):
    labels, scores = rows
    same = paired_bootstrap(auc_statistic(labels, scores), auc_statistic(labels, scores[::-1]), 400, resamples=200)
    assert abs(same.mean) < 1e-12
    assert abs(same.ci_low) < 1e-12
    assert abs(same.ci_high) < 1e-12
    better = paired_bootstrap(
        auc_statistic(labels, scores + 0.2 * labels), auc_statistic(labels, scores), 400, resamples=200
    )
    assert 0 < better.ci_low < better.mean < better.ci_high
    # Unpaired, the interval of such a difference would be as wide as that of two AUCs.
    single = paired_bootstrap(auc_statistic(labels, scores), mean_statistic(np.zeros(400)), 400, resamples=200)
    assert better.ci_high - better.ci_low < (single.ci_high - single.ci_low) / 3


def test_the_interval_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(size=2000)
    found = paired_bootstrap(mean_statistic(values), mean_statistic(np.zeros(2000)), 2000)
    half = 1.96 * values.std() / 2000**0.5
    np.testing.assert_allclose([found.ci_low, found.ci_high], values.mean() + np.array([-half, half]), atol=0.1 * half)
    assert found == paired_bootstrap(mean_statistic(values), mean_statistic(np.zeros(2000)), 2000)


def test_rows_of_a_group_are_drawn_together():
    """Ten rows that are the same thing ten times say no more than one."""
    values = np.random.default_rng(0).normal(size=500)
    once = paired_bootstrap(mean_statistic(values), mean_statistic(np.zeros(500)), 500)
    repeated, groups = values.repeat(10), np.arange(500).repeat(10)
    together = paired_bootstrap(mean_statistic(repeated), mean_statistic(np.zeros(5000)), 5000, groups_B=groups)
    np.testing.assert_allclose(list(vars(together).values()), list(vars(once).values()), rtol=1e-9)
    apart = paired_bootstrap(mean_statistic(repeated), mean_statistic(np.zeros(5000)), 5000)
    assert apart.ci_high - apart.ci_low < 0.5 * (once.ci_high - once.ci_low)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0, 0], [1, 2, 3], "labels 0 and 1"),
        ([0, 1, np.nan], [1, 2, 3], "labels 0 and 1"),
        ([0, 1, 1], [1, 2], "scores for 3 rows"),
        ([0, 1, 1], [1, 2, np.nan], "finite scores"),
    ],
)
def test_refusals(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        auc_statistic(np.array(labels), np.array(scores))


def test_resamples_of_one_class_are_left_out():
    statistic = auc_statistic(np.array([1, 0, 0, 0]), np.array([[0.9, 0.1, 0.2, 0.3]]))
    assert np.isnan(statistic(np.array([0, 2, 1, 1]))).all()
    found = paired_bootstrap(statistic, mean_statistic(np.zeros(4)), 4, resamples=50)
    assert found.mean == found.ci_low == found.ci_high == 1.0
