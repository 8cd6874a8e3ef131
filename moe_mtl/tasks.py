"""What a task is: its name, its kind, its loss; what each kind of label means is the table in `kinds.py`.

Shapes: `B` rows of a batch, `C` outputs of a task, `H`, `W` height and width of a map in pixels.
"""

import dataclasses
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kinds import KINDS
from .naming import nearest

# A model keeps its towers in a ModuleDict under the tasks' names, so these are taken ("type", "items", "train", ...).
_TAKEN = frozenset(dir(torch.nn.ModuleDict()))

SHARED = "shared"  # what is no task's own, wherever parts are named after tasks


class UnknownTaskError(KeyError):
    """A task was asked for that the model, processor or file does not have."""

    def __init__(self, unknown: Sequence[str], known: Sequence[str]):
        self.unknown, self.known = list(unknown), list(known)
        super().__init__(f"unknown task {', '.join(map(repr, unknown))}; known tasks: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return self.args[0]


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
        edge_weight: of edges: what an edge pixel weighs in the loss, in (0, 1); any other weighs 1 minus that. 0.95 as
            in ASTMT; MLoRE takes 0.925.
        edge_tolerance: of edges: how far from an edge `ods_f` counts a pixel as found, as a fraction of the map's
            diagonal, in (0, 1). 0.0075 as on PASCAL-Context; the field takes 0.011 on NYUD-v2.

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
    edge_weight: float = 0.95
    edge_tolerance: float = 0.0075

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
        low, high = KINDS[self.kind].outputs
        if not low <= self.num_outputs <= high:
            raise ValueError(
                f"{where}: num_outputs of a {self.kind} task must be in [{low}, {high}], found {self.num_outputs}"
            )
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 <= self.weight < 1e6:
            raise ValueError(f"{where}: weight must be a number in [0, 1e6), found {self.weight!r}")
        for field in ("edge_weight", "edge_tolerance"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, float) or not 0 < value < 1:
                raise ValueError(f"{where}: {field} must be a number between 0 and 1, found {value!r}")
            if self.kind != "edges" and value != getattr(type(self), field):
                raise ValueError(f"{where}: a {self.kind} task has no {field}, found {value!r}")
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
        if self.space is not None and self.dense:
            raise ValueError(f"{where}: a {self.kind} task has no space, found {self.space!r}")
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
    def reported_metrics(self) -> tuple[str, ...]:
        return self.metrics or KINDS[self.kind].metrics

    @property
    def dense(self) -> bool:
        """Whether rows are pictures and the label of one is a map."""
        return KINDS[self.kind].dense

    @property
    def missing(self) -> float | int:
        """NaN or -100: the label of a row that has none."""
        return KINDS[self.kind].missing

    def predict(self, logits: Tensor) -> Tensor:
        """Logits `[B, C]` -> probability `[B]` (binary), `[B, C]` (multiclass, multilabel) or value (regression).

        Of a dense task logits `[B, C, H, W]` -> probabilities `[B, C, H, W]` (segmentation) or `[B, H, W]` (saliency,
        edges), unit vectors `[B, 3, H, W]` (normals) or values `[B, H, W]` (depth).
        """
        return KINDS[self.kind].predict(logits)

    def counted(self, labels: Tensor) -> Tensor:
        """What carries a label: rows, bool `[B]`, or of a dense task pixels, bool `[B, H, W]`."""
        present = ~torch.isnan(labels) if labels.dtype.is_floating_point else labels != self.missing
        if self.dense:
            return present.all(1) if labels.dim() == 4 else present
        return present.flatten(1).all(1) if present.dim() > 1 else present

    def labelled(self, labels: Tensor) -> Tensor:
        """Which rows carry a label: bool `[B]`; of a dense task, the pictures with a labelled pixel."""
        counted = self.counted(labels)
        return counted.flatten(1).any(1) if self.dense else counted

    def loss(
        self, logits: Tensor, labels: Tensor, weights_B: Tensor | None = None, mask_B: Tensor | None = None
    ) -> Tensor:
        """Mean loss over the rows that count, or the pixels: scalar, 0 (with a gradient of 0) where none does.

        Args:
            logits: `[B, C]`, or `[B, C, H, W]` of a dense task, any float dtype; the loss is taken in float32 at least.
            labels: `[B]` or `[B, C]`; of a dense task `[B, H, W]` or, of normals, `[B, 3, H, W]`. NaN or -100 is
                missing.
            weights_B: weight per row, finite and not negative; the mean is sum(w l) / sum(w). A picture's weight is
                that of each of its pixels.
            mask_B: further rows to leave out (False), for example those outside the task's space.

        Raises:
            ValueError: labels, weights or mask that do not fit, before any loss is taken.

        Source of the dense losses: cross-entropy; L1 on unit vectors, averaged over the channels; L1; binary
        cross-entropy with `edge_weight` on edges (Maninis et al., ASTMT, CVPR 2019, section 5) or with HED's balance.
        Differs from the official code in: a map without a labelled pixel gives 0 in every kind; the balance of saliency
        counts each picture by its weight.
        """
        total, weight = self.loss_terms(logits, labels, weights_B, mask_B)
        # Where nothing counts by 1, not by the least number there is: its inverse, times the task's weight, overflows.
        return total / torch.where(weight > 0, weight, 1)

    def loss_terms(
        self, logits: Tensor, labels: Tensor, weights_B: Tensor | None = None, mask_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`sum(w l)` and `sum(w)`, two scalars, whose quotient is `loss`; of several batches they can be added."""
        kind = KINDS[self.kind]
        self.check_labels(logits, labels)
        counted = self.counted(labels)
        rows = len(counted)
        if weights_B is not None:
            self._check_weights(weights_B, rows)
        if mask_B is not None:
            if tuple(mask_B.shape) != (rows,):
                raise ValueError(
                    f"space of task {self.name!r}: expected a mask of shape {[rows]}, found {list(mask_B.shape)}"
                )
            counted = counted & _per_row(mask_B, counted)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.dense:
            blank = counted.unsqueeze(1) if labels.dim() == 4 else counted
        else:
            blank = _per_row(counted, labels)
        if labels.dtype.is_floating_point:
            labels = labels.to(logits.dtype)
        # A missing label is replaced by a harmless one and weighed 0: NaN * 0 would still be NaN.
        labels = torch.where(blank, labels, torch.zeros_like(labels))
        loss = kind.loss(logits, labels)
        weights = counted.to(loss.dtype)
        if weights_B is not None:
            weights = _per_row(weights_B.to(loss.dtype), counted) * counted
        if kind.balance is not None:
            loss = loss * kind.balance(labels, weights, self.edge_weight)
        return (loss * weights).sum(), weights.sum()

    def check_labels(self, logits: Tensor, labels: Tensor) -> None:
        """Raises ValueError where the labels are not of this task's kind, before any loss is taken."""
        if logits.dim() != (4 if self.dense else 2):
            expected = "[B, C, H, W]" if self.dense else "[B, C]"
            raise ValueError(f"logits of task {self.name!r}: expected {expected}, found {list(logits.shape)}")
        rows, outputs, *size = logits.shape
        dtype = KINDS[self.kind].label_dtype
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels of task {self.name!r}: expected a tensor, found {type(labels).__name__}")
        if not labels.dtype.is_floating_point if dtype.is_floating_point else labels.dtype != dtype:
            raise ValueError(f"labels of task {self.name!r}: expected {dtype} ({self.kind}), found {labels.dtype}")
        shapes: list[tuple[int, ...]] = [(rows, outputs, *size)]
        if self.kind in ("binary", "multiclass") or (self.dense and self.kind != "normals"):
            shapes = [(rows, *size)]
        elif self.kind == "regression" and outputs == 1:
            shapes.append((rows,))
        if tuple(labels.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"labels of task {self.name!r}: expected shape {expected}, found {list(labels.shape)}")
        if torch.compiler.is_compiling() or labels.numel() == 0:
            return
        least, most = torch.aminmax(torch.where(labels.isnan(), 0.0, labels) if dtype.is_floating_point else labels)
        low, high = least.item(), most.item()
        bounds = KINDS[self.kind].label_range
        if self.kind in ("multiclass", "segmentation"):
            if high >= outputs or (low < 0 and bool(((labels < 0) & (labels != self.missing)).any())):
                raise ValueError(
                    f"labels of task {self.name!r}: expected class ids in [0, {outputs - 1}] or -100 for missing, "
                    f"found values from {low} to {high}"
                )
        elif bounds is not None:
            if low < bounds[0] or high > bounds[1]:
                raise ValueError(
                    f"labels of task {self.name!r}: expected values in [{bounds[0]}, {bounds[1]}] or NaN, found {low} "
                    f"to {high}"
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


def _per_row(values_B: Tensor, like: Tensor) -> Tensor:
    """`[B]` to be combined with `like` `[B, ...]`."""
    return values_B.reshape(-1, *[1] * (like.dim() - 1))


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
