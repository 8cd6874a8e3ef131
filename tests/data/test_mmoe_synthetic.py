"""The MMoE paper's generator, held to its formula and to correlations measured with another implementation."""

import numpy as np
import pytest

from moe_mtl.data import DataError, load


def arrays(splits):
    table = splits.train
    x = np.stack([table[f"x{i}"].to_numpy() for i in range(len(splits.features))], 1)
    return x, table["y1"].to_numpy(), table["y2"].to_numpy()


def test_without_sines_and_noise_the_labels_are_projections_with_the_given_cosine():
    splits = load("mmoe-synthetic", correlation=0.6, num_sines=0, noise=0.0, num_features=20, train_rows=200)
    x, y1, y2 = arrays(splits)
    w1, w2 = (np.linalg.lstsq(x, y, rcond=None)[0] for y in (y1, y2))
    assert np.linalg.norm(w1) == pytest.approx(0.3)
    assert np.linalg.norm(w2) == pytest.approx(0.3)
    assert w1 @ w2 == pytest.approx(0.6 * 0.09)


def test_the_nonlinear_part_is_shared_by_the_tasks():
    # At correlation 1 both tasks are the same function of x: only the noise differs.
    x, y1, y2 = arrays(load("mmoe-synthetic", correlation=1.0, noise=0.0, train_rows=500))
    np.testing.assert_allclose(y1, y2, atol=1e-12)
    # What is left of a label beyond its projection is a sum of five sines of it.
    w = np.linalg.lstsq(x, y1, rcond=None)[0]
    assert abs(y1 - x @ w).max() > 0.05
    noisy = arrays(load("mmoe-synthetic", correlation=1.0, noise=0.1, train_rows=20_000))
    assert np.std(noisy[1] - noisy[2]) == pytest.approx(0.1 * np.sqrt(2), rel=0.03)


def test_label_correlation_falls_with_the_correlation_of_the_weights():
    def mean(correlation):
        found = []
        for seed in range(20):
            _, y1, y2 = arrays(load("mmoe-synthetic", correlation=correlation, train_rows=2_000, seed=seed))
            found.append(np.corrcoef(y1, y2)[0, 1])
        return np.mean(found)

    high, middle, none = mean(1.0), mean(0.5), mean(0.0)
    # Measured elsewhere over 20 draws: .81 +- .20, .38 +- .11 and .003 +- .01.
    assert high == pytest.approx(0.81, abs=0.2)
    assert middle == pytest.approx(0.38, abs=0.12)
    assert none == pytest.approx(0.0, abs=0.03)


def test_seeds_repeat_and_differ():
    options = {"train_rows": 50, "validation_rows": 5, "test_rows": 7}
    assert load("mmoe-synthetic", **options).info == load("mmoe-synthetic", **options).info
    assert load("mmoe-synthetic", **options).info["rows"] == {"train": 50, "validation": 5, "test": 7}
    assert load("mmoe-synthetic", **options, seed=1).info["sha256"] != load("mmoe-synthetic", **options).info["sha256"]


@pytest.mark.parametrize("options", [{"correlation": 1.1}, {"num_features": 1}, {"test_rows": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(DataError, match="mmoe-synthetic"):
        load("mmoe-synthetic", **options)
