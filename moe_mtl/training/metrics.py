"""Metrics per task over a whole split, by scikit-learn, in float64; log loss by its definition, see `_log_loss`.

Shapes: `B` rows, `C` outputs of a task.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from sklearn import metrics as sk
from torch import Tensor

from ..tasks import Task

# For early stopping and comparisons: larger is better, smaller is better.
MAXIMISED = ("auc", "group_auc", "accuracy", "f1", "exact_match", "mean_iou", "pixel_accuracy", "max_f", "ods_f")
MINIMISED = ("log_loss", "rmse", "mae", "mean_angle", "abs_error", "loss")

Metrics = dict[str, dict[str, float]]


def counted_rows(task: Task, labels: Mapping[str, Tensor]) -> Tensor:
    """The rows on which a task is trained and measured: labelled, and inside its space. Bool `[B]`."""
    rows_B = task.labelled(labels[task.name])
    if task.space is not None and task.space in labels:
        rows_B = rows_B & (labels[task.space] == 1)
    return rows_B


def compute_metrics(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    groups: np.ndarray | None = None,
    unscale: Callable[[str, Tensor], Tensor] | None = None,
) -> Metrics:
    """What each task reports, over the rows that count for it.

    Args:
        tasks: the tasks; those without logits or labels are left out.
        logits: task -> `[B, C]`.
        labels: task -> `[B]` or `[B, C]`; NaN or -100 is missing.
        weights: task -> weight of each row `[B]`.
        groups: group of each row `[B]`, for `group_auc`.
        unscale: the processor's `unscale`: brings a regression's value and label into original units.

    Returns:
        task -> metric -> value; NaN, with a warning, where a metric is not defined on these rows (AUC of one class).
    """
    rows = counted(tasks, logits, labels, weights, groups, unscale)
    return {
        task.name: {metric: measure(metric, task.kind, rows[task.name]) for metric in task.reported_metrics}
        for task in tasks
        if task.name in rows
    }


def standard_errors(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    groups: np.ndarray | None = None,
    unscale: Callable[[str, Tensor], Tensor] | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Metrics:
    """Bootstrap standard error of what `compute_metrics` gives: rows drawn with replacement, anew for each task."""
    out: Metrics = {}
    by_name = {task.name: task for task in tasks}
    for name, rows in counted(tasks, logits, labels, weights, groups, unscale).items():
        generator, task = np.random.default_rng(seed), by_name[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample may hold one class only
            drawn = [
                rows.take(generator.integers(0, len(rows), len(rows))) for _ in range(resamples if len(rows) else 0)
            ]
            values = {metric: [measure(metric, task.kind, part) for part in drawn] for metric in task.reported_metrics}
        out[name] = {
            metric: float(np.nanstd(v, ddof=1)) if np.isfinite(v).sum() > 1 else float("nan")
            for metric, v in values.items()
        }
    return out


def counted(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    groups: np.ndarray | None = None,
    unscale: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, "Rows"]:
    """Scores and labels of the rows that count, by task; see `compute_metrics`."""
    out = {}
    for task in tasks:
        if task.name not in logits or task.name not in labels:
            continue
        rows_B = counted_rows(task, labels).numpy()
        score, label = logits[task.name], labels[task.name]
        if task.kind == "regression":
            label = label.reshape(score.shape)
            if unscale is not None:
                score, label = unscale(task.name, score), unscale(task.name, label)
            label = label.double()
        else:
            score = task.predict(score)
        weight = None if weights is None or task.name not in weights else weights[task.name].double().numpy()[rows_B]
        group = None if groups is None else groups[rows_B]
        out[task.name] = Rows(task.name, score.double().numpy()[rows_B], label.numpy()[rows_B], weight, group)
    return out


def mean_metrics(metrics: Metrics) -> dict[str, float]:
    """`mean_<metric>`: each metric averaged over the tasks that report it and on whose rows it is defined, else NaN.

    A metric that is called a mean already keeps its name: `mean_iou`.
    """
    out = {}
    for name in sorted({name for values in metrics.values() for name in values}):
        defined = [values[name] for values in metrics.values() if not np.isnan(values.get(name, np.nan))]
        out[averaged(name)] = float(np.mean(defined)) if defined else float("nan")
    return out


def averaged(metric: str) -> str:
    """What a metric is called once it is averaged over tasks."""
    return metric if metric.startswith("mean_") else f"mean_{metric}"


def is_maximised(key: str) -> bool:
    """Whether more is better, for `income/auc`, `mean_auc`, `loss`. Raises ValueError for no metric."""
    name = key.rsplit("/", 1)[-1]
    if name not in MAXIMISED + MINIMISED:
        name = name.removeprefix("mean_")
    if name not in MAXIMISED + MINIMISED:
        raise ValueError(
            f"unknown metric {key!r}: expected loss, mean_<metric> or <task>/<metric>, metric one of "
            f"{', '.join(MAXIMISED + MINIMISED)}"
        )
    return name in MAXIMISED


class Rows:
    """The rows of one task that count: `score` and `label` `[B]` or `[B, C]`, `weight` and `group` `[B]` or None."""

    def __init__(
        self, task: str, score: np.ndarray, label: np.ndarray, weight: np.ndarray | None, group: np.ndarray | None
    ):
        self.task, self.score, self.label, self.weight, self.group = task, score, label, weight, group

    def __len__(self) -> int:
        return len(self.label)

    def take(self, index: np.ndarray) -> "Rows":
        """The rows of `index`, with repetition."""
        weight, group = (None if values is None else values[index] for values in (self.weight, self.group))
        return Rows(self.task, self.score[index], self.label[index], weight, group)


def measure(metric: str, kind: str, rows: Rows) -> float:
    """One metric of one task, NaN where it is not defined."""
    if len(rows) == 0 or (rows.weight is not None and not rows.weight.sum() > 0):
        warnings.warn(f"task {rows.task!r} has no counted row: {metric} is not defined", stacklevel=2)
        return float("nan")
    if not np.isfinite(rows.score).all():
        warnings.warn(f"task {rows.task!r} has scores that are not finite: {metric} is not defined", stacklevel=2)
        return float("nan")
    value = _MEASURES[metric](kind, rows)
    if np.isnan(value):
        warnings.warn(
            f"{metric} of task {rows.task!r} is not defined: its counted rows have labels of one class only",
            stacklevel=2,
        )
    return float(value)


def _auc(kind: str, rows: Rows) -> float:
    """Area under the ROC curve; the mean over classes (one against the rest) or outputs that have both labels."""
    if kind == "binary":
        return _binary_auc(rows.label, rows.score, rows.weight)
    columns = range(rows.score.shape[1])
    targets = [rows.label == c if kind == "multiclass" else rows.label[:, c] for c in columns]
    areas = [_binary_auc(targets[c], rows.score[:, c], rows.weight) for c in columns]
    areas = [area for area in areas if not np.isnan(area)]
    return float(np.mean(areas)) if areas else float("nan")


def _binary_auc(label: np.ndarray, score: np.ndarray, weight: np.ndarray | None) -> float:
    label = label > 0.5
    if label.all() or not label.any():
        return float("nan")
    return float(sk.roc_auc_score(label, score, sample_weight=weight))


def _group_auc(kind: str, rows: Rows) -> float:
    """AUC within each group, averaged by the groups' rows, or weight; groups of one class are left out."""
    if rows.group is None:
        raise ValueError(
            f"task {rows.task!r} reports group_auc: the column of the groups must be named (data.group_column)"
        )
    order = np.argsort(rows.group, kind="stable")
    bounds = np.flatnonzero(np.diff(rows.group[order])) + 1
    areas, sizes = [], []
    for index in np.split(order, bounds):
        weight = None if rows.weight is None else rows.weight[index]
        area = _binary_auc(rows.label[index], rows.score[index], weight)
        if not np.isnan(area):
            areas.append(area)
            sizes.append(len(index) if weight is None else weight.sum())
    return float(np.average(areas, weights=sizes)) if areas else float("nan")


def _log_loss(kind: str, rows: Rows) -> float:
    """Cross-entropy; for multilabel, averaged over the outputs.

    Not scikit-learn's: that clips probabilities at 2e-16, where float32 scores go down to 1e-38, and rescales softmax
    outputs whose float32 sum is not 1 to float64's precision.
    """
    if kind == "multiclass":
        chosen = rows.score[np.arange(len(rows)), rows.label]
        losses = -np.log(np.clip(chosen, _TINY, 1.0))
    else:
        score = np.clip(rows.score, _TINY, 1 - np.finfo(np.float64).epsneg)
        losses = -(rows.label * np.log(score) + (1 - rows.label) * np.log1p(-score))
        losses = losses if losses.ndim == 1 else losses.mean(1)
    return float(np.average(losses, weights=rows.weight))


_TINY = float(torch.finfo(torch.float32).tiny)  # scores are float32: smaller ones were rounded to 0


def _decisions(kind: str, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    if kind == "multiclass":
        return rows.label, rows.score.argmax(1)
    return rows.label > 0.5, rows.score > 0.5


def _accuracy(kind: str, rows: Rows) -> float:
    """Share of right decisions; for multilabel, over all outputs."""
    label, decision = _decisions(kind, rows)
    if kind == "multilabel":
        return 1 - float(sk.hamming_loss(label, decision, sample_weight=rows.weight))
    return float(sk.accuracy_score(label, decision, sample_weight=rows.weight))


def _f1(kind: str, rows: Rows) -> float:
    """F1 of the positive class; the mean over classes or outputs where there are several."""
    label, decision = _decisions(kind, rows)
    average = "binary" if kind == "binary" else "macro"
    return float(sk.f1_score(label, decision, average=average, sample_weight=rows.weight, zero_division=0.0))


def _rmse(kind: str, rows: Rows) -> float:
    # Not root_mean_squared_error, which takes the root per output.
    return float(np.sqrt(sk.mean_squared_error(rows.label, rows.score, sample_weight=rows.weight)))


def _mae(kind: str, rows: Rows) -> float:
    return float(sk.mean_absolute_error(rows.label, rows.score, sample_weight=rows.weight))


_MEASURES: dict[str, Callable[[str, Rows], float]] = {
    "auc": _auc,
    "group_auc": _group_auc,
    "log_loss": _log_loss,
    "accuracy": _accuracy,
    "f1": _f1,
    "rmse": _rmse,
    "mae": _mae,
}
