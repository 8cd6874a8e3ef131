"""What each kind of label means: its type, loss, prediction and metrics, in one table.

Shapes: `B` rows of a batch, `C` outputs of a task, `H`, `W` height and width of a map in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = (
    *("auc", "group_auc", "log_loss", "accuracy", "f1", "rmse", "mae"),
    *("mean_iou", "pixel_accuracy", "max_f", "ods_f", "mean_angle", "abs_error"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of label.

    Attributes:
        label_dtype: dtype of the label tensor.
        loss: `(logits_BC, labels) -> loss_B`, of a dense kind `(logits_BCHW, labels) -> loss_BHW`; what has no label is
            given a harmless one.
        predict: `logits_BC -> ` probabilities or values, see `Task.predict`.
        metrics: what is reported when the task names no metrics.
        allowed_metrics: what can be reported.
        outputs: fewest and most outputs of a task.
        label_range: lowest and highest label, where they are bounded.
        dense: whether a row is a picture and its label a map.
        balance: of a dense kind, `(labels_BHW, weights_BHW, edge_weight) -> ` factor of each pixel's loss.
    """

    label_dtype: torch.dtype
    loss: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    metrics: tuple[str, ...]
    allowed_metrics: tuple[str, ...]
    outputs: tuple[int, int] = (1, 65_536)
    label_range: tuple[float, float] | None = None
    dense: bool = False
    balance: Callable[[Tensor, Tensor, float], Tensor] | None = None

    @property
    def missing(self) -> float | int:
        """The label that marks a missing one: NaN for floats, -100 for integers."""
        return float("nan") if self.label_dtype.is_floating_point else -100


def _one_column(values_BC: Tensor) -> Tensor:
    return values_BC.squeeze(-1) if values_BC.shape[-1] == 1 else values_BC


def _sigmoid(logits: Tensor) -> Tensor:
    """In float64, then rounded: float32's vector and scalar code differ in the last bit, so that an answer would
    depend on where in its batch a row stands."""
    return torch.sigmoid(logits.double()).to(logits.dtype)


def _is_positive(labels_BHW: Tensor) -> Tensor:
    """Soft maps, as the mean of several annotators, are cut at 0.5 (ASTMT)."""
    return (labels_BHW >= 0.5).to(labels_BHW.dtype)


def _binary_map_loss(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_BCHW.squeeze(1), _is_positive(labels_BHW), reduction="none")


def _edge_balance(labels_BHW: Tensor, weights_BHW: Tensor, edge_weight: float) -> Tensor:
    return (1 - edge_weight) + (2 * edge_weight - 1) * _is_positive(labels_BHW)


def _class_balance(labels_BHW: Tensor, weights_BHW: Tensor, edge_weight: float) -> Tensor:
    """Each class weighs the other's share of the batch (HED, Xie and Tu, ICCV 2015, equation 2): a batch of one class
    has no loss."""
    positive_BHW = _is_positive(labels_BHW)
    share = (positive_BHW * weights_BHW).sum() / weights_BHW.sum().clamp_min(torch.finfo(weights_BHW.dtype).tiny)
    return torch.where(positive_BHW > 0, 1 - share, share)


def unit_vectors(values_BCHW: Tensor) -> Tensor:
    """Scaled to length 1 over the channels; a vector shorter than 1e-6 is divided by that."""
    return F.normalize(values_BCHW, dim=1, eps=1e-6)


KINDS: dict[str, Kind] = {
    "binary": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels_B: F.binary_cross_entropy_with_logits(
            logits_BC.squeeze(-1), labels_B, reduction="none"
        ),
        predict=lambda logits_BC: _sigmoid(logits_BC.squeeze(-1)),
        metrics=("auc", "log_loss"),
        allowed_metrics=("auc", "group_auc", "log_loss", "accuracy", "f1"),
        outputs=(1, 1),
        label_range=(0, 1),
    ),
    "multiclass": Kind(
        label_dtype=torch.int64,
        loss=lambda logits_BC, labels_B: F.cross_entropy(logits_BC, labels_B, reduction="none"),
        predict=lambda logits_BC: torch.softmax(logits_BC, dim=-1),
        metrics=("accuracy", "log_loss"),
        allowed_metrics=("auc", "log_loss", "accuracy", "f1"),
        outputs=(2, 1_000_000),
    ),
    "multilabel": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels_BC: F.binary_cross_entropy_with_logits(
            logits_BC, labels_BC, reduction="none"
        ).mean(-1),
        predict=_sigmoid,
        metrics=("auc", "log_loss"),
        allowed_metrics=("auc", "log_loss", "accuracy", "f1"),
        label_range=(0, 1),
    ),
    "regression": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels: (logits_BC - labels.reshape(logits_BC.shape)).square().mean(-1),
        predict=_one_column,
        metrics=("rmse", "mae"),
        allowed_metrics=("rmse", "mae"),
    ),
    "segmentation": Kind(
        label_dtype=torch.int64,
        loss=lambda logits_BCHW, labels_BHW: F.cross_entropy(logits_BCHW, labels_BHW, reduction="none"),
        predict=lambda logits_BCHW: torch.softmax(logits_BCHW, dim=1),
        metrics=("mean_iou",),
        allowed_metrics=("mean_iou", "pixel_accuracy"),
        outputs=(2, 65_536),
        dense=True,
    ),
    "saliency": Kind(
        label_dtype=torch.float32,
        loss=_binary_map_loss,
        predict=lambda logits_BCHW: _sigmoid(logits_BCHW.squeeze(1)),
        metrics=("mean_iou",),
        allowed_metrics=("mean_iou", "max_f"),
        outputs=(1, 1),
        label_range=(0, 1),
        dense=True,
        balance=_class_balance,
    ),
    "edges": Kind(
        label_dtype=torch.float32,
        loss=_binary_map_loss,
        predict=lambda logits_BCHW: _sigmoid(logits_BCHW.squeeze(1)),
        metrics=("ods_f",),
        allowed_metrics=("ods_f",),
        outputs=(1, 1),
        label_range=(0, 1),
        dense=True,
        balance=_edge_balance,
    ),
    "normals": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BCHW, labels_BCHW: (unit_vectors(logits_BCHW) - labels_BCHW).abs().mean(1),
        predict=unit_vectors,
        metrics=("mean_angle",),
        allowed_metrics=("mean_angle",),
        outputs=(3, 3),
        label_range=(-1.001, 1.001),  # unit vectors, to rounding
        dense=True,
    ),
    "depth": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BCHW, labels_BHW: (logits_BCHW.squeeze(1) - labels_BHW).abs(),
        predict=lambda logits_BCHW: logits_BCHW.squeeze(1),
        metrics=("rmse",),
        allowed_metrics=("rmse", "abs_error"),
        outputs=(1, 1),
        dense=True,
    ),
}
