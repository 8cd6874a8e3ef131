"""Metrics of dense tasks, batch after batch, in float64: counts and sums are kept, never the maps.

Shapes: `B` pictures of a batch, `C` outputs, `H`, `W` height and width, `P` counted pixels of a batch.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kinds import unit_vectors
from ..tasks import Task
from .edge_measure import EdgeCounts, best_f

F_THRESHOLDS = 99


class Meter(Protocol):
    """What keeps count of some metrics of one task.

    Attributes:
        totals: float64, of any shape: sums over pictures, from which the values follow. So the totals of two sets of
            pictures add up to those of both.
    """

    totals: np.ndarray

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        """One batch: `Task.predict` in float64, labels, and which pixels count."""

    def values(self) -> dict[str, float]:
        """The metrics so far; NaN where one is not defined."""


class DenseMetrics:
    """What a dense task reports, over every labelled pixel of the data set.

    Args:
        task: a dense task.

    Raises:
        ValueError: a task of another kind.
    """

    def __init__(self, task: Task):
        if not task.dense:
            raise ValueError(f"task {task.name!r}: expected a dense kind, found {task.kind!r}")
        self.task = task
        kinds = dict.fromkeys(_METERS[name] for name in task.reported_metrics)
        self.meters: list[Meter] = [kind(task) for kind in kinds]
        self.pixels, self.finite = 0, True

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """One batch: logits `[B, C, H, W]` and labels as `Task.loss` takes them, on any device."""
        self.task.check_labels(logits, labels)
        logits, labels = logits.detach().cpu(), labels.cpu()
        counted_BHW = self.task.counted(labels)
        pixels = int(counted_BHW.sum())
        if not pixels:
            return
        self.pixels += pixels
        self.finite = self.finite and bool(logits.isfinite().all())
        if self.finite:
            predicted = self.task.predict(logits.double())
            for meter in self.meters:
                meter.add(predicted, labels, counted_BHW)

    def values(self) -> dict[str, float]:
        """Metric -> value; NaN, with a warning, where it is not defined."""
        found = {name: value for meter in self.meters for name, value in meter.values().items()}
        if not self.pixels or not self.finite:
            found = dict.fromkeys(found, float("nan"))
            why = "has predictions that are not finite" if self.pixels else "has no labelled pixel"
        else:
            why = "has no pixel of the positive class among its labels"
        out = {name: found[name] for name in self.task.reported_metrics}
        if undefined := [name for name, value in out.items() if np.isnan(value)]:
            warnings.warn(f"task {self.task.name!r} {why}: {', '.join(undefined)} is not defined", stacklevel=2)
        return out


class Confusion:
    """`mean_iou` and `pixel_accuracy` from the counts of label against predicted class.

    IoU of a class is TP / (TP + FP + FN) over all pixels of the data set. The mean is over the classes that labels or
    predictions have. Of saliency the classes are background and foreground, cut at 0.5.

    Differs from the official code in: InvPT's meter (Ye and Xu, ECCV 2022) counts 0 for a class that neither labels nor
    predictions have; ASTMT's saliency IoU is of the foreground alone, per picture.
    """

    def __init__(self, task: Task):
        self.classes = max(2, task.num_outputs)
        self.totals = np.zeros((self.classes, self.classes))

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        if predicted.dim() == 4:
            chosen_BHW = predicted.argmax(1)
        else:
            chosen_BHW, labels = (predicted > 0.5).long(), (labels >= 0.5).long()
        pair_P = labels[counted_BHW] * self.classes + chosen_BHW[counted_BHW]
        self.totals += torch.bincount(pair_P, minlength=self.classes**2).reshape(self.totals.shape).numpy()

    def values(self) -> dict[str, float]:
        right = self.totals.diagonal()
        union = self.totals.sum(0) + self.totals.sum(1) - right
        iou = right[union > 0] / union[union > 0]
        total = self.totals.sum()
        return {
            "mean_iou": float(iou.mean()) if len(iou) else float("nan"),
            "pixel_accuracy": float(right.sum() / total) if total else float("nan"),
        }


class MaxF:
    """`max_f`: the best F1 over 99 thresholds, precision and recall pooled over the data set.

    Differs from the official code in: InvPT's meter takes the sigmoid of probabilities once more, so that only its
    thresholds between 0.5 and 0.73 tell pixels apart.
    """

    def __init__(self, task: Task):
        self.thresholds = torch.arange(1, F_THRESHOLDS + 1, dtype=torch.float64) / (F_THRESHOLDS + 1)
        self.totals = np.zeros((2, F_THRESHOLDS + 1))  # by class, and by how many thresholds are reached

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        reached_P = torch.bucketize(predicted[counted_BHW], self.thresholds, right=True)
        positive_P = labels[counted_BHW] >= 0.5
        for row, chosen_P in enumerate((~positive_P, positive_P)):
            self.totals[row] += torch.bincount(reached_P[chosen_P], minlength=F_THRESHOLDS + 1).numpy()

    def values(self) -> dict[str, float]:
        negative, positive = self.totals
        if not positive.sum():
            return {"max_f": float("nan")}
        true = positive[::-1].cumsum()[::-1][1:]
        false = negative[::-1].cumsum()[::-1][1:]
        return {"max_f": float((2 * true / (true + false + positive.sum())).max())}


class Edges:
    """`ods_f`, see `EdgeCounts`, within the task's `edge_tolerance`."""

    def __init__(self, task: Task):
        self.counts = EdgeCounts(task.edge_tolerance)
        self.totals = self.counts.totals

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        self.counts.add(predicted.numpy(), (labels >= 0.5).numpy(), counted_BHW.numpy())

    def values(self) -> dict[str, float]:
        return {"ods_f": best_f(self.totals)}


class Angle:
    """`mean_angle`: degrees between the predicted vector and the label, over all pixels."""

    def __init__(self, task: Task):
        self.totals = np.zeros(2)  # degrees, pixels

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        labels = unit_vectors(torch.where(counted_BHW.unsqueeze(1), labels, 0.0).double())
        # Kahan's formula, which is exact for small angles too, where the arc cosine is not.
        angle_BHW = 2 * torch.atan2((predicted - labels).norm(dim=1), (predicted + labels).norm(dim=1))
        self.totals += (float(torch.rad2deg(angle_BHW)[counted_BHW].sum()), int(counted_BHW.sum()))

    def values(self) -> dict[str, float]:
        degrees, pixels = self.totals
        return {"mean_angle": float(degrees / pixels) if pixels else float("nan")}


class Error:
    """`rmse` and `abs_error` over all pixels, in the label's unit."""

    def __init__(self, task: Task):
        self.totals = np.zeros(3)  # squares, absolute values, pixels

    def add(self, predicted: Tensor, labels: Tensor, counted_BHW: Tensor) -> None:
        error_P = (predicted - labels)[counted_BHW]
        self.totals += (float(error_P.square().sum()), float(error_P.abs().sum()), len(error_P))

    def values(self) -> dict[str, float]:
        squares, absolute, pixels = self.totals
        if not pixels:
            return {"rmse": float("nan"), "abs_error": float("nan")}
        return {"rmse": float((squares / pixels) ** 0.5), "abs_error": float(absolute / pixels)}


_METERS: Mapping[str, Any] = {
    "mean_iou": Confusion,
    "pixel_accuracy": Confusion,
    "max_f": MaxF,
    "ods_f": Edges,
    "mean_angle": Angle,
    "rmse": Error,
    "abs_error": Error,
}
