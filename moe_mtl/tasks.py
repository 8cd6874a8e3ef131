"""What a task is: its name, its kind, and the one table that says what each kind of label means.

Shapes: `B` rows of a batch, `C` outputs of a task.
"""

import dataclasses
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .naming import nearest

# A model keeps its towers in a ModuleDict under the tasks' names, so these are taken ("type", "items", "train", ...).
_TAKEN = frozenset(dir(torch.nn.ModuleDict()))

SHARED = "shared"  # what is no task's own, wherever parts are named after tasks
METRICS = ("auc", "group_auc", "log_loss", "accuracy", "f1", "rmse", "mae")


class UnknownTaskError(KeyError):
    """A task was asked for that the model, processor or file does not have."""

    def __init__(self, unknown: Sequence[str], known: Sequence[str]):
        self.unknown, self.known = list(unknown), list(known)
        super().__init__(f"unknown task {', '.join(map(repr, unknown))}; known tasks: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return self.args[0]


@dataclass(frozen=True)
class Kind:
    """One kind of label.

    Attributes:
        label_dtype: dtype of the label tensor.
        loss: `(logits_BC, labels) -> loss_B`; only called on labelled rows.
        predict: `logits_BC -> ` probabilities or values, see `Task.predict`.
        metrics: what is reported when the task names no metrics.
        allowed_metrics: what can be reported.
    """

    label_dtype: torch.dtype
    loss: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    metrics: tuple[str, ...]
    allowed_metrics: tuple[str, ...]

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


KINDS: dict[str, Kind] = {
    "binary": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels_B: F.binary_cross_entropy_with_logits(
            logits_BC.squeeze(-1), labels_B, reduction="none"
        ),
        predict=lambda logits_BC: _sigmoid(logits_BC.squeeze(-1)),
        metrics=("auc", "log_loss"),
        allowed_metrics=("auc", "group_auc", "log_loss", "accuracy", "f1"),
    ),
    "multiclass": Kind(
        label_dtype=torch.int64,
        loss=lambda logits_BC, labels_B: F.cross_entropy(logits_BC, labels_B, reduction="none"),
        predict=lambda logits_BC: torch.softmax(logits_BC, dim=-1),
        metrics=("accuracy", "log_loss"),
        allowed_metrics=("auc", "log_loss", "accuracy", "f1"),
    ),
    "multilabel": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels_BC: F.binary_cross_entropy_with_logits(
            logits_BC, labels_BC, reduction="none"
        ).mean(-1),
        predict=_sigmoid,
        metrics=("auc", "log_loss"),
        allowed_metrics=("auc", "log_loss", "accuracy", "f1"),
    ),
    "regression": Kind(
        label_dtype=torch.float32,
        loss=lambda logits_BC, labels: (logits_BC - labels.reshape(logits_BC.shape)).square().mean(-1),
        predict=_one_column,
        metrics=("rmse", "mae"),
        allowed_metrics=("rmse", "mae"),
    ),
}


def check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
        raise ValueError(f"{what} must be letters, digits and '_' (at most 100), found {name!r}")
    if name in _TAKEN or keyword.iskeyword(name):
        why = "a Python keyword" if keyword.iskeyword(name) else "an attribute of torch.nn.ModuleDict"
        raise ValueError(f"{what} {name!r} is taken: it is {why}; choose another, the column can keep its name")


@dataclass(frozen=True)
class Task:
    """One thing a model predicts.

    Args:
        name: how the task is addressed everywhere; letters, digits and `_`, not starting with a digit.
        kind: one of `KINDS`; it decides the loss, the head and the default metrics.
        num_outputs: logits per row, `C`: 1 for binary, the number of classes for multiclass.
        weight: factor of the task's loss in the total; 0 trains nothing through this task's own label.
        group: tasks of one group share experts in HoME; `None` makes the task a group of its own.
        metrics: what to report, by default what suits the kind.
        space: name of a binary task: loss and metrics of this task count only rows where that label is 1
            (conversion among clicked rows).
        product_of: names of binary tasks whose probabilities multiply to this task's (ESMM: CTR x CVR = CTCVR).
            Such a task has no tower.

    Raises:
        ValueError: a field that makes no sense, by name.
    """

    name: str
    kind: str
    num_outputs: int = 1
    weight: float | int = 1.0
    group: str | None = None
    metrics: tuple[str, ...] | None = None
    space: str | None = None
    product_of: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_name("task name", self.name)
        where = f"task {self.name!r}"
        if self.name == SHARED:
            raise ValueError("task name 'shared' is taken: it names the shared experts")
        if self.group is not None:
            check_name(f"{where}: group", self.group)
        if self.space is not None and not isinstance(self.space, str):
            raise ValueError(f"{where}: space must be the name of a task, found {self.space!r}")
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, found {self.kind!r}")
        if isinstance(self.num_outputs, bool) or not isinstance(self.num_outputs, int):
            raise ValueError(f"{where}: num_outputs must be an integer, found {self.num_outputs!r}")
        low, high = {"binary": (1, 1), "multiclass": (2, 1_000_000)}.get(self.kind, (1, 65_536))
        if not low <= self.num_outputs <= high:
            raise ValueError(
                f"{where}: num_outputs of a {self.kind} task must be in [{low}, {high}], found {self.num_outputs}"
            )
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 <= self.weight < 1e6:
            raise ValueError(f"{where}: weight must be a number in [0, 1e6), found {self.weight!r}")
        for field in ("metrics", "product_of"):
            value = getattr(self, field)
            if value is not None:
                if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                    raise ValueError(f"{where}: {field} must be a list of names, found {value!r}")
                object.__setattr__(self, field, tuple(value))
        for metric in self.metrics or ():
            if metric not in KINDS[self.kind].allowed_metrics:
                allowed = ", ".join(KINDS[self.kind].allowed_metrics)
                raise ValueError(f"{where}: a {self.kind} task has the metrics {allowed}; found {metric!r}")
        if self.product_of is not None and (self.kind != "binary" or len(self.product_of) < 2):
            raise ValueError(f"{where}: product_of needs kind 'binary' and at least two tasks")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Task":
        """Builds a task from its fields; an unknown field is an error that names the nearest known one."""
        if not isinstance(fields, dict):
            raise ValueError(f"a task must be a mapping of its fields, found {fields!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise ValueError(f"task {fields.get('name')!r}: unknown field {key!r}{nearest(key, known)}")
        for key in ("name", "kind"):
            if key not in fields:
                raise ValueError(f"a task needs a {key!r}, found only {sorted(fields)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as JSON types."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @property
    def dense(self) -> bool:
        """Whether the answer is a map the size of the image."""
        return self.kind in ("segmentation", "saliency", "edges", "normals", "depth")

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        return self.metrics or KINDS[self.kind].metrics

    @property
    def missing(self) -> float | int:
        """NaN or -100: the label of a row that has none."""
        return KINDS[self.kind].missing

    def predict(self, logits_BC: Tensor) -> Tensor:
        """Logits `[B, C]` -> probability `[B]` (binary), `[B, C]` (multiclass, multilabel) or value (regression)."""
        return KINDS[self.kind].predict(logits_BC)

    def labelled(self, labels: Tensor) -> Tensor:
        """Which rows carry a label: bool `[B]`."""
        present = ~torch.isnan(labels) if labels.dtype.is_floating_point else labels != self.missing
        return present.flatten(1).all(1) if present.dim() > 1 else present

    def loss(
        self, logits_BC: Tensor, labels: Tensor, weights_B: Tensor | None = None, mask_B: Tensor | None = None
    ) -> Tensor:
        """Mean loss over the rows that count: scalar, 0 (with a gradient of 0) where none does.

        Args:
            logits_BC: `[B, C]`, any float dtype; the loss is taken in float32 at least.
            labels: `[B]` or `[B, C]`; NaN or -100 is missing.
            weights_B: weight per row, finite and not negative; the mean is sum(w l) / sum(w).
            mask_B: further rows to leave out (False), for example those outside the task's space.

        Raises:
            ValueError: labels, weights or mask that do not fit, before any loss is taken.
        """
        self.check_labels(logits_BC, labels)
        count_B = self.labelled(labels)
        if weights_B is not None:
            self._check_weights(weights_B, len(count_B))
        if mask_B is not None:
            if mask_B.shape != count_B.shape:
                raise ValueError(
                    f"space of task {self.name!r}: expected a mask of shape {list(count_B.shape)}, "
                    f"found {list(mask_B.shape)}"
                )
            count_B = count_B & mask_B
        if logits_BC.dtype in (torch.float16, torch.bfloat16):
            logits_BC = logits_BC.float()
        blank = count_B.reshape(-1, *[1] * (labels.dim() - 1))
        if labels.dtype.is_floating_point:
            labels = labels.to(logits_BC.dtype)
        # A missing label is replaced by a harmless one and weighed 0: NaN * 0 would still be NaN.
        loss_B = KINDS[self.kind].loss(logits_BC, torch.where(blank, labels, torch.zeros_like(labels)))
        weights_B = count_B.to(loss_B.dtype) if weights_B is None else weights_B.to(loss_B.dtype) * count_B
        return (loss_B * weights_B).sum() / weights_B.sum().clamp_min(torch.finfo(loss_B.dtype).tiny)

    def check_labels(self, logits_BC: Tensor, labels: Tensor) -> None:
        """Raises ValueError where the labels are not of this task's kind, before any loss is taken."""
        rows, outputs = logits_BC.shape
        dtype = KINDS[self.kind].label_dtype
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels of task {self.name!r}: expected a tensor, found {type(labels).__name__}")
        if not labels.dtype.is_floating_point if dtype.is_floating_point else labels.dtype != dtype:
            raise ValueError(f"labels of task {self.name!r}: expected {dtype} ({self.kind}), found {labels.dtype}")
        shapes: list[tuple[int, ...]] = [(rows, outputs)]
        if self.kind in ("binary", "multiclass"):
            shapes = [(rows,)]
        elif self.kind == "regression" and outputs == 1:
            shapes.append((rows,))
        if tuple(labels.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"labels of task {self.name!r}: expected shape {expected}, found {list(labels.shape)}")
        if torch.compiler.is_compiling() or labels.numel() == 0:
            return
        least, most = torch.aminmax(torch.where(labels.isnan(), 0.0, labels) if dtype.is_floating_point else labels)
        low, high = least.item(), most.item()
        if self.kind == "multiclass":
            if high >= outputs or (low < 0 and bool(((labels < 0) & (labels != self.missing)).any())):
                raise ValueError(
                    f"labels of task {self.name!r}: expected class ids in [0, {outputs - 1}] or -100 for missing, "
                    f"found values from {low} to {high}"
                )
        elif self.kind in ("binary", "multilabel"):
            if low < 0 or high > 1:
                raise ValueError(
                    f"labels of task {self.name!r}: expected values in [0, 1] or NaN, found {low} to {high}"
                )
        elif not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError(f"labels of task {self.name!r}: expected finite values or NaN, found infinity")

    def _check_weights(self, weights_B: Tensor, rows: int) -> None:
        where = f"sample_weights of task {self.name!r}"
        if not isinstance(weights_B, Tensor) or tuple(weights_B.shape) != (rows,):
            found = list(weights_B.shape) if isinstance(weights_B, Tensor) else type(weights_B).__name__
            raise ValueError(f"{where}: expected shape [{rows}], found {found}")
        if torch.compiler.is_compiling() or rows == 0:
            return
        low, high = (bound.item() for bound in torch.aminmax(weights_B))  # NaN wins both
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"{where}: expected finite weights of at least 0, found {low} to {high}")


def parse_tasks(tasks: Sequence[dict[str, Any] | Task]) -> list[Task]:
    """Tasks from their dicts, names checked to be unique and references to exist.

    Raises:
        ValueError: a duplicate name, or `space` / `product_of` naming something that is no binary task of the list.
    """
    parsed = [task if isinstance(task, Task) else Task.from_dict(task) for task in tasks]
    names = [task.name for task in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"task {name!r} is declared twice")
    plain = {task.name for task in parsed if task.kind == "binary" and task.product_of is None}
    binary = {task.name for task in parsed if task.kind == "binary"}
    for task in parsed:
        if task.space is not None and (task.space not in binary or task.space == task.name):
            raise ValueError(f"task {task.name!r}: space must name another binary task, found {task.space!r}")
        for factor in task.product_of or ():
            if factor not in plain or factor == task.name:
                raise ValueError(
                    f"task {task.name!r}: product_of must name other binary tasks with a tower, found {factor!r}"
                )
    return parsed


def check_task_names(wanted: str | Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The wanted tasks as a list in the known order; all of them for None.

    Raises:
        UnknownTaskError: a name that is not known.
        ValueError: an empty list.
    """
    if wanted is None:
        return list(known)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if not wanted:
        raise ValueError(f"tasks: expected at least one of {', '.join(known)}, found an empty list")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UnknownTaskError(unknown, known)
    return [name for name in known if name in wanted]
