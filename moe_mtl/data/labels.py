"""Labels: from a column of a table to the tensor a task is trained on, and back from logits to the user's units.

A declaration per task, all fields optional:

    column      the column (default: the task's name), or a list of columns for a multilabel or multi-output
                regression task
    positive    binary: the value or values that count as 1; every other one is 0
    negative    binary: the values that count as 0; with it any further value is an error
    all_of      binary: tasks; 1 where all of them are 1 (clicked and bought), 0 where one is 0
    classes     multiclass, multilabel: the values in order of their class ids; by default learned, sorted
    separator   multilabel: what cuts a text column (default `|`)
    standardise regression: false keeps the column's units (default true: mean 0, deviation 1 in training)
    weight_column  the column with the weight of each row for this task

A missing value is a missing label: NaN, or -100 for classes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..tasks import Task
from .categories import CategoryCounts, Vocabulary, check_vocabulary, split_lists
from .errors import DataError, check_keys
from .numeric import NumericSummary, check_number
from .values import canonical_list, factorise, numbers

FIELDS = ("column", "positive", "negative", "all_of", "classes", "separator", "standardise", "weight_column")
FIELDS_OF_KIND = {
    "binary": ("column", "positive", "negative", "all_of", "weight_column"),
    "multiclass": ("column", "classes", "weight_column"),
    "multilabel": ("column", "classes", "separator", "weight_column"),
    "regression": ("column", "standardise", "weight_column"),
}
TRUTH = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
MAX_CLASSES = 100_000

Columns = Mapping[str, pa.Array | pa.ChunkedArray]


@dataclass
class Label:
    """How one task's label is read, once fitted.

    Attributes:
        task: name of the task.
        kind: its kind.
        columns: where the values are; empty for `all_of`.
        positive, negative: canonical texts (binary), or None.
        all_of: tasks whose labels are joined, or None.
        classes: canonical texts in order of their ids (multiclass, multilabel from one column), or None.
        separator: what cuts a multilabel text column.
        mean, std: scale per output (regression).
        weight_column: where the row weights are, or None.
        within: binary labels from columns, or None: where one of them is not 1, the label is missing. A task whose
            sample space was left behind has them.
    """

    task: str
    kind: str
    columns: list[str]
    positive: list[str] | None = None
    negative: list[str] | None = None
    all_of: list[str] | None = None
    classes: list[str] | None = None
    separator: str = "|"
    mean: list[float] | None = None
    std: list[float] | None = None
    weight_column: str | None = None
    within: list["Label"] | None = None

    @property
    def reads(self) -> list[str]:
        """The columns it needs."""
        own = self.columns + ([self.weight_column] if self.weight_column else [])
        return own + [column for label in self.within or () for column in label.reads]

    def encode(self, batch: Columns, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """float32 or int64, `[B]` or `[B, C]` as the kind has it. Not for `all_of`, which the processor joins.

        Raises:
            DataError: a value that is no label of this kind.
        """
        if self.kind == "regression":
            values = np.stack([numbers(batch[column], missing, column, rows) for column in self.columns], axis=1)
            values = ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
            return values if len(self.columns) > 1 else values[:, 0]
        if self.kind == "multiclass":
            return self._class_ids(batch[self.columns[0]], missing, rows)
        if self.kind == "binary":
            return self._truth(self.columns[0], batch, missing, rows)
        if self.classes is not None:
            return self._tags(batch[self.columns[0]], missing, rows)
        return np.stack([self._truth(column, batch, missing, rows) for column in self.columns], axis=1)

    def masked(self, values: np.ndarray, batch: Columns, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """Encoded labels, missing where one of `within` is not 1."""
        for label in self.within or ():
            outside_B = label.encode(batch, missing, rows) != 1
            values[outside_B] = np.nan if values.dtype.kind == "f" else -100
        return values

    def inside(self, space: Sequence["Label"]) -> "Label":
        """This label, missing where one of the labels of `space` is not 1; these are binary and from columns."""
        parts = [dataclasses.replace(part, weight_column=None, within=None) for part in space]
        parts += [further for part in space for further in part.within or ()]
        return dataclasses.replace(self, within=[*(self.within or ()), *parts])

    def _truth(self, column: str, batch: Columns, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        codes, texts = factorise(batch[column], missing, column)
        if self.positive is None:
            table = [TRUTH.get(text, math.nan) for text in texts.to_pylist()]
            expected = "0 or 1, or true or false"
        else:
            ones, zeros = set(self.positive), set(self.negative or ())
            table = [
                1.0 if t in ones else 0.0 if self.negative is None or t in zeros else math.nan
                for t in texts.to_pylist()
            ]
            expected = f"one of {', '.join(map(repr, self.positive + (self.negative or [])))}"
        values = np.array([*table, math.nan], np.float32)[codes]
        wrong = np.isnan(values) & (codes >= 0)
        if wrong.any():
            row = int(wrong.argmax())
            found = texts[int(codes[row])].as_py()
            hint = "" if self.positive else "; declare which values are 'positive' if they are others"
            raise DataError(
                f"label of task {self.task!r}: expected {expected}, found {found!r:.80}{hint}", column, int(rows[row])
            )
        return values

    def _class_ids(self, column: pa.Array | pa.ChunkedArray, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        codes, texts = factorise(column, missing, self.columns[0])
        ids = self._vocabulary().ids(codes, texts, rows)
        return np.where(ids < 0, -100, ids - 1)

    def _tags(self, column: pa.Array | pa.ChunkedArray, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        lengths, codes, texts, absent = split_lists(column, self.separator, missing, self.columns[0])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        values = np.zeros((len(lengths), len(self.classes or ())), np.float32)
        values[owner, self._vocabulary().ids(codes, texts, np.asarray(rows)[owner]) - 1] = 1
        values[absent] = np.nan
        return values

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.columns[0], self.classes or [], "error")

    def encode_weights(self, batch: Columns, missing: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """float32 `[B]`. Raises DataError for a weight that is missing or negative."""
        assert self.weight_column is not None
        values = numbers(batch[self.weight_column], missing, self.weight_column, rows)
        wrong = ~(values >= 0)
        if wrong.any():
            row = int(wrong.argmax())
            found = "none" if np.isnan(values[row]) else values[row]
            raise DataError(
                f"weight of task {self.task!r}: expected a number of at least 0, found {found}",
                self.weight_column,
                int(rows[row]),
            )
        return values.astype(np.float32)

    def names(self) -> list[str] | None:
        """What the outputs are called in predictions, where there are several."""
        if self.classes is not None:
            return self.classes
        return self.columns if len(self.columns) > 1 else None

    def unscale(self, values: torch.Tensor) -> torch.Tensor:
        """Regression values `[B]` or `[B, C]` -> float64 in the column's units."""
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        scaled = values.detach().to("cpu", torch.float64)
        return scaled * std + mean if scaled.dim() > 1 else scaled * std[0] + mean[0]

    def check(self, task: Task, labels: Mapping[str, "Label"]) -> None:
        """Raises DataError where the label does not suit its task, or joins tasks that cannot be joined."""
        where = f"label of task {self.task!r}"
        if self.kind != task.kind:
            raise DataError(f"{where}: expected the kind {task.kind}, found {self.kind}")
        outputs = len(self.classes if self.classes is not None else self.columns) or 1
        if outputs != task.num_outputs:
            raise DataError(f"{where}: expected {task.num_outputs} outputs, found {outputs}")
        for part in self.within or ():
            if part.kind != "binary" or part.all_of is not None or part.within is not None:
                raise DataError(f"{where}: within: expected binary labels from columns, found {part.to_dict()!r:.80}")
        for name in self.all_of or ():
            other = labels.get(name)
            if other is None or other.kind != "binary" or other.all_of is not None:
                raise DataError(f"{where}: all_of: expected binary tasks with a column, found {name!r}")

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if value is not None}
        if self.within is not None:
            fields["within"] = [label.to_dict() for label in self.within]
        if self.kind != "multilabel":
            del fields["separator"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Label":
        """Raises DataError for an unknown field or one of the wrong type."""
        where = f"label of task {fields.get('task') if isinstance(fields, Mapping) else fields!r}"
        fields = check_keys(fields, cls.__dataclass_fields__, where, ("task", "kind", "columns"))
        for key, value in fields.items():
            if key in ("mean", "std"):
                if not isinstance(value, list) or len(value) != len(fields["columns"]):
                    raise DataError(f"{where}: {key}: expected one number per column, found {value!r:.80}")
                for number in value:
                    check_number(number, f"{where}: {key}", 0.0 if key == "std" else -math.inf)
            elif key in ("columns", "positive", "negative", "all_of", "classes"):
                check_vocabulary(value, f"{where}: {key}")
            elif key == "within":
                if not isinstance(value, list) or not value:
                    raise DataError(f"{where}: within: expected a list of labels, found {value!r:.80}")
                fields["within"] = [cls.from_dict(part) for part in value]
            elif not isinstance(value, str):
                raise DataError(f"{where}: {key}: expected a text, found {value!r:.80}")
        label = cls(**fields)
        if (label.mean is None or label.std is None) and label.kind == "regression":
            raise DataError(f"{where}: a regression label needs a mean and a std")
        if label.kind == "multiclass" and not label.classes:
            raise DataError(f"{where}: a multiclass label needs classes")
        if bool(label.columns) == (label.all_of is not None):
            raise DataError(f"{where}: expected either columns or all_of")
        return label


class LabelFitter:
    """Reads a declaration, watches the training rows go by, and makes the `Label`.

    Args:
        fields: the task's, from `task_fields`.
        declared: the declaration, see the top of this file.
        available: the columns there are.

    Raises:
        DataError: a field that does not suit the kind of task.
    """

    def __init__(self, fields: Mapping[str, Any], declared: Mapping[str, Any], available: Sequence[str]):
        name, kind = fields["name"], fields["kind"]
        self.where = f"label of task {name!r}"
        self.outputs: int | None = fields.get("num_outputs")
        if kind not in FIELDS_OF_KIND:
            raise DataError(f"{self.where}: expected a kind of {', '.join(FIELDS_OF_KIND)}, found {kind!r}")
        declared = check_keys(declared, FIELDS_OF_KIND[kind], f"{self.where} ({kind})")
        column = declared.get("column", name)
        columns = [column] if isinstance(column, str) else list(column)
        all_of = declared.get("all_of")
        if all_of is None and "column" not in declared and fields.get("product_of") and name not in available:
            all_of = fields["product_of"]
        if "negative" in declared and "positive" not in declared:
            raise DataError(f"{self.where}: 'negative' needs 'positive'")
        if all_of is not None:
            if "column" in declared or "positive" in declared:
                raise DataError(f"{self.where}: 'all_of' takes neither a column nor positive values")
            columns, all_of = [], list(all_of)
        if len(columns) != 1 and kind in ("binary", "multiclass") and all_of is None:
            raise DataError(f"{self.where}: expected one column, found {columns}")
        self.label = Label(name, kind, columns, all_of=all_of, weight_column=declared.get("weight_column"))
        for key in ("positive", "negative", "classes"):
            if key in declared:
                values = declared[key] if isinstance(declared[key], (list, tuple)) else [declared[key]]
                setattr(self.label, key, canonical_list(values, f"{self.where}: {key}"))
        self.label.separator = declared.get("separator", "|")
        self.standardise = declared.get("standardise", True)
        self.learns_classes = self.label.classes is None and (
            kind == "multiclass" or (kind == "multilabel" and len(columns) == 1)
        )
        self.counts = CategoryCounts()
        self.summaries = [NumericSummary() for _ in columns] if kind == "regression" else []

    def update(self, batch: Columns, missing: Sequence[str], rows: Sequence[int]) -> None:
        """Takes one batch of training rows."""
        for column, summary in zip(self.label.columns, self.summaries, strict=False):
            summary.update(numbers(batch[column], missing, column, rows))
        if self.learns_classes or self.label.positive is not None:
            column = self.label.columns[0]
            if self.label.kind == "multilabel":
                _, codes, texts, _ = split_lists(batch[column], self.label.separator, missing, column)
            else:
                codes, texts = factorise(batch[column], missing, column)
            self.counts.update(codes, texts)
            if len(self.counts.counts) > MAX_CLASSES:
                raise DataError(f"{self.where}: expected at most {MAX_CLASSES} different values, found more", column)

    def finish(self) -> tuple[Label, int]:
        """The label, and the number of outputs its task has.

        Raises:
            DataError: no positive value among the rows, more classes than the task has outputs, no label at all.
        """
        label, found = self.label, list(self.counts.counts)
        if label.positive is not None and not set(label.positive) & set(found):
            raise DataError(
                f"{self.where}: no row has a positive value; expected {label.positive}, found {found!r:.200}",
                label.columns[0],
            )
        if self.summaries:
            scales = [
                self._scale(summary, column) for summary, column in zip(self.summaries, label.columns, strict=True)
            ]
            label.mean, label.std = [mean for mean, _ in scales], [std for _, std in scales]
        if self.learns_classes:
            label.classes = self._classes(found)
        outputs = len(label.classes or label.columns) or 1
        if self.outputs is not None and self.outputs != outputs:
            what = "classes" if label.classes else "columns"
            raise DataError(
                f"{self.where}: expected {self.outputs} {what} (num_outputs), found {outputs}: "
                f"{(label.classes or label.columns)!r:.200}"
            )
        return label, outputs

    def _scale(self, summary: NumericSummary, column: str) -> tuple[float, float]:
        if not summary.count:
            raise DataError(f"{self.where}: expected at least one value, found none", column)
        mean, std = summary.scale()
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise DataError(
                f"{self.where}: expected values whose mean and deviation fit a double, found an overflow", column
            )
        return (mean, std) if self.standardise else (0.0, 1.0)

    def _classes(self, found: list[str]) -> list[str]:
        """Sorted, as numbers where all are integers. Integers below the number of outputs are class ids as they are."""
        if not found:
            raise DataError(f"{self.where}: expected at least one label, found none", self.label.columns[0])
        whole = _integers(found)
        if whole is None:
            return sorted(found)
        if self.outputs is not None and all(0 <= number < self.outputs for number in whole):
            return [str(i) for i in range(self.outputs)]
        return [str(number) for number in sorted(whole)]


def _integers(texts: Sequence[str]) -> list[int] | None:
    """The texts as integers if each of them is how an int64 is written (`007` is not), else None."""
    if not all(re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text) for text in texts):
        return None
    values = [int(text) for text in texts]
    return values if all(-(2**63) <= value < 2**63 for value in values) else None


def task_fields(task: Task | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a task, `num_outputs` left out where it is to be learned: a dict need not give it.

    Raises:
        ValueError: an unknown or missing field, a value that makes no sense.
    """
    if isinstance(task, Task):
        return {**task.to_dict(), "num_outputs": task.num_outputs}
    learns = isinstance(task, Mapping) and task.get("kind") == "multiclass" and "num_outputs" not in task
    Task.from_dict({**task, "num_outputs": 2} if learns else dict(task))
    return dict(task)


def decode_task(task: Task, label: Label, logits_BC: torch.Tensor) -> dict[str, np.ndarray]:
    """Predictions of one task by column name, see `TabularProcessor.decode`."""
    predicted = task.predict(logits_BC.detach().float().cpu())
    if task.kind == "binary":
        return {task.name: predicted.numpy()}
    if task.kind == "regression":
        values = label.unscale(predicted).numpy()
        return (
            {task.name: values}
            if values.ndim == 1
            else {f"{task.name}/{n}": values[:, i] for i, n in enumerate(label.columns)}
        )
    names = label.names() or [task.name]
    columns = {f"{task.name}/{name}": predicted[:, i].numpy() for i, name in enumerate(names)}
    return columns if task.kind == "multilabel" else {task.name: _classes(names)[predicted.argmax(1).numpy()]} | columns


def _classes(names: Sequence[str]) -> np.ndarray:
    """Classes as values of the user: integers or booleans where all are, else their texts."""
    if (whole := _integers(names)) is not None:
        return np.array(whole, dtype=np.int64)
    if set(names) == {"false", "true"}:
        return np.array([name == "true" for name in names])
    return np.array(names, dtype=object)
