"""Is the difference between two models more than the luck of the test rows? A paired bootstrap, seeds averaged.

Legend: `B` rows, `S` seeds, `R` resamples. Both models are judged on the same resampled rows, so that what makes a row
hard for both cancels. A resample is a vector of counts: each statistic sorts its scores once, and then only weighs
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Difference:
    """`statistic - baseline`: its value on the rows themselves and its percentile interval."""

    mean: float
    ci_low: float
    ci_high: float


def auc_statistic(labels_B: np.ndarray, scores_SB: np.ndarray) -> Statistic:
    """Area under the ROC curve of each seed's scores: P(score of a positive > score of a negative), ties counted half.

    Raises:
        ValueError: a label other than 0 and 1, one class only, or shapes that do not fit.
    """
    labels_B, scores_SB = np.asarray(labels_B, dtype=np.float64), np.atleast_2d(np.asarray(scores_SB, dtype=np.float64))
    if set(np.unique(labels_B)) != {0.0, 1.0}:
        raise ValueError(f"expected labels 0 and 1, both present, found {np.unique(labels_B)[:5]}")
    if labels_B.shape != scores_SB.shape[1:]:
        raise ValueError(f"expected scores for {labels_B.shape[0]} rows, found shape {scores_SB.shape}")
    if not np.isfinite(scores_SB).all():
        raise ValueError("expected finite scores, found NaN or infinity")
    positive, negative = np.flatnonzero(labels_B == 1), np.flatnonzero(labels_B == 0)
    prepared = []
    for scores_B in scores_SB:
        ascending = negative[np.argsort(scores_B[negative])]
        below, not_above = (
            np.searchsorted(scores_B[ascending], scores_B[positive], side) for side in ("left", "right")
        )
        prepared.append((ascending, below, not_above))

    def statistic(counts_B: np.ndarray) -> np.ndarray:
        weights = counts_B[positive]
        pairs = weights.sum() * counts_B[negative].sum()
        aucs_S = np.full(len(prepared), np.nan)
        for s, (ascending, below, not_above) in enumerate(prepared):
            negatives = np.concatenate([[0.0], np.cumsum(counts_B[ascending])])  # how many stand before each place
            aucs_S[s] = weights @ (negatives[below] + negatives[not_above]) / (2 * pairs) if pairs else np.nan
        return aucs_S

    return statistic


def mean_statistic(values_SB: np.ndarray, *, root: bool = False) -> Statistic:
    """Mean over rows of per-row values, one per seed: hits give the accuracy, squared errors with `root` the RMSE."""
    values_SB = np.atleast_2d(np.asarray(values_SB, dtype=np.float64))

    def statistic(counts_B: np.ndarray) -> np.ndarray:
        mean_S = values_SB @ counts_B / counts_B.sum()
        return np.sqrt(mean_S) if root else mean_S

    return statistic


def paired_bootstrap(
    model: Statistic,
    baseline: Statistic,
    num_rows: int,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups_B: np.ndarray | None = None,
) -> Difference:
    """Difference of two statistics over the same rows, seeds averaged, with its percentile interval (Efron 1979).

    Rows of one group, numbered from 0, are drawn together: tiles of one photograph are no independent draws, and an
    interval that took them for such would be too narrow. A resample that a statistic cannot judge (one class only) is
    left out.
    """
    generator = np.random.default_rng(seed)
    groups_B = np.arange(num_rows) if groups_B is None else groups_B
    drawn = int(groups_B.max()) + 1
    mean = float((model(np.ones(num_rows)) - baseline(np.ones(num_rows))).mean())
    differences_R = np.empty(resamples)
    for r in range(resamples):
        counts = np.bincount(generator.integers(drawn, size=drawn), minlength=drawn).astype(np.float64)
        counts_B = counts[groups_B]
        differences_R[r] = model(counts_B).mean() - baseline(counts_B).mean()
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(differences_R, [tail, 1 - tail])
    return Difference(mean, float(low), float(high))
