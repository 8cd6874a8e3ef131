"""From a user's rows to tensors and from logits back to the user's units; learnt once, saved beside the model."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..naming import nearest
from ..tasks import Task, UnknownTaskError, check_task_names, parse_tasks
from .categories import ListColumn, check_vocabulary
from .errors import DataError, check_choice, check_keys
from .features import COLUMNS, Column, FeatureFitter
from .infer import infer_features
from .labels import Label, LabelFitter, decode_task, task_fields
from .saved import FILE, SavedProcessor
from .sources import BATCH_ROWS, open_source
from .values import canonical_text, factorise

VERSION = 1
TYPE = "moe_mtl_tabular"


class TabularProcessor(SavedProcessor):
    """Turns rows into the tensors of a model and its logits into predictions.

    Made by `fit` or `from_pretrained`. Encoding depends on nothing but the saved file and the row: the same row gives
    the same tensors alone, in a batch, from a frame or from a file.

    What happens to values that training has not seen: a category is "unknown" or an error, as declared per feature; a
    missing number is the training median or an error; a missing column, text in a numeric column and an infinity are
    errors; columns that training did not have are ignored, or an error with `extra_columns="error"`.
    """

    advice = ": set min_count or max_categories of the features with the most values"

    def __init__(
        self,
        columns: Sequence[Column],
        tasks: Sequence[Task],
        labels: Mapping[str, Label],
        group_column: str | None = None,
        known_columns: Sequence[str] | None = None,
        missing_values: Sequence[str] = ("",),
    ):
        names = [column.name for column in columns]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"feature {name!r} is declared twice")
        if isinstance(missing_values, str) or not all(isinstance(text, str) for text in missing_values):
            raise DataError(f"missing_values: expected a list of texts, found {missing_values!r}")
        self.columns = list(columns)
        self.parsed_tasks = parse_tasks(list(tasks))
        self.labels = dict(labels)
        if list(self.labels) != [task.name for task in self.parsed_tasks]:
            names = [task.name for task in self.parsed_tasks]
            raise DataError(f"expected a label for each of the tasks {names}, found {list(self.labels)}")
        if not self.columns or not self.parsed_tasks:
            raise DataError(f"expected at least one feature and one task, found {len(columns)} and {len(tasks)}")
        for task in self.parsed_tasks:
            self.labels[task.name].check(task, self.labels)
        self.group_column, self.missing_values = group_column, tuple(missing_values)
        self.known_columns = list(known_columns) if known_columns is not None else None
        read = {column for label in self.labels.values() for column in label.reads}
        if leaks := sorted(read & set(names)):
            raise DataError(f"columns {leaks} are labels or weights and cannot be features")

    @classmethod
    def fit(
        cls,
        source: Any,
        tasks: Sequence[Task | Mapping[str, Any]],
        features: Sequence[Mapping[str, Any]] | None = None,
        *,
        labels: Mapping[str, Mapping[str, Any]] | None = None,
        group_column: str | None = None,
        extra_columns: str = "ignore",
        missing_values: Sequence[str] = ("",),
    ) -> "TabularProcessor":
        """Learns vocabularies, scales, defaults and bins in one pass over the training rows.

        Args:
            source: the rows, see `open_source`; a file is streamed.
            tasks: what is predicted; a multiclass or multilabel task given as a dict may leave out `num_outputs`.
            features: declarations, see `NumericFeature`, `CategoricalFeature`, `ListFeature`; by default inferred from
                every column that is no label, weight or group (`infer_features`).
            labels: how each task's label is read, by task, see `moe_mtl.data.labels`; by default the column with the
                task's name.
            group_column: the column whose values group AUC goes by.
            extra_columns: "error" refuses, from now on, rows with columns that the training rows do not have.
            missing_values: texts that stand for a missing value, in any column.

        Raises:
            DataError: no rows, a missing column, a value that cannot be what its column is declared to be.
        """
        source = open_source(source)
        check_choice(extra_columns, ("ignore", "error"), "extra_columns")
        missing_values = [canonical_text(text) for text in missing_values]
        labels = dict(labels or {})
        fields = [task_fields(task) for task in tasks]
        names = [field["name"] for field in fields]
        for name in labels:
            if name not in names:
                raise DataError(f"label declared for an unknown task {name!r}{nearest(name, names)}")
        fitters = [LabelFitter(field, labels.get(field["name"], {}), source.columns) for field in fields]
        label_columns = list(dict.fromkeys(column for fitter in fitters for column in fitter.label.reads))
        if features is None:
            used = [*label_columns, *([group_column] if group_column else [])]
            features, _ = infer_features(source, exclude=used, missing_values=missing_values)
        inputs = FeatureFitter(features)
        wanted = list(dict.fromkeys([*inputs.names, *label_columns]))
        source.require([*wanted, *([group_column] if group_column else [])], "training rows")
        num_rows = 0
        for rows, batch in source.batches(wanted, BATCH_ROWS):
            num_rows += len(rows)
            inputs.update(batch, missing_values, rows)
            for fitter in fitters:
                fitter.update(batch, missing_values, rows)
        if not num_rows:
            raise DataError("expected rows to learn from, found none")
        columns = inputs.finish()
        finished = [fitter.finish() for fitter in fitters]
        learned = [
            Task.from_dict(field | {"num_outputs": outputs})
            for field, (_, outputs) in zip(fields, finished, strict=True)
        ]
        by_task = {label.task: label for label, _ in finished}
        known = source.columns if extra_columns == "error" else None
        return cls(columns, learned, by_task, group_column, known, missing_values)

    # --- what the model's config needs ---

    @property
    def features(self) -> list[dict[str, Any]]:
        """The features as a config holds them; order within a kind is column order in the tensors."""
        return [column.describe() for column in self.columns]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks as a config holds them."""
        return [task.to_dict() for task in self.parsed_tasks]

    def for_tasks(self, tasks: Sequence[str]) -> "TabularProcessor":
        """The processor of the model that answers only `tasks`; it reads no other label.

        A task whose sample space is left behind keeps it: rows outside of it have no label, so that it is measured and
        trained on the rows it always was.

        Raises:
            UnknownTaskError: a task the processor does not know.
            DataError: a label that cannot be read without that of a task left behind.
        """
        names = check_task_names(tasks, list(self.labels))
        kept, labels = [], {}
        for task in self.parsed_tasks:
            if task.name not in names:
                continue
            label = self.labels[task.name]
            if absent := [name for name in label.all_of or () if name not in names]:
                raise DataError(f"the label of task {task.name!r} is made of that of {absent[0]!r}: extract both")
            if task.space is not None and task.space not in names:
                if within := [other.name for other in self.parsed_tasks if other.space == task.name]:
                    raise DataError(f"task {within[0]!r} counts where {task.name!r} is 1: extract {task.space!r} too")
                space = self.labels[task.space]
                parts = [space] if space.all_of is None else [self.labels[name] for name in space.all_of]
                label, task = label.inside(parts), dataclasses.replace(task, space=None)
            kept.append(task)
            labels[task.name] = label
        return type(self)(self.columns, kept, labels, self.group_column, self.known_columns, self.missing_values)

    # --- rows -> tensors ---

    def __call__(self, rows: Any, labels: bool | Sequence[str] = True) -> dict[str, Any]:
        """Encodes rows, all at once.

        Args:
            rows: anything `open_source` takes.
            labels: whether to read labels, weights and groups too; False for prediction. Names of tasks: the labels
                that these are measured with, which are also those that they are made of or counted within.

        Returns:
            `numeric` float32 `[B, Fn]`, `categorical` int64 `[B, Fc]`, `sequences` int64 `[B, Fs, L]` padded with -1;
            a kind without features is left out. With labels also `labels` by task, `sample_weights` by task and
            `groups` int64 `[B]` where declared.

        Raises:
            DataError: no rows, a missing column, a value that cannot be what its column is declared to be.
            UnknownTaskError: a name in `labels` that the processor does not know.
        """
        return _concatenate([encoded for _, encoded in self.stream(rows, labels)])

    def stream(
        self, rows: Any, labels: bool | Sequence[str] = True, batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        """Encodes rows batch by batch, for files larger than memory: yields `(row numbers, what __call__ returns)`.

        Raises:
            DataError, UnknownTaskError: as `__call__`.
        """
        read = self._read_for(labels)
        source = open_source(rows)
        wanted = [column.name for column in self.columns]
        if read:
            wanted += [column for label in read.values() for column in label.reads]
            wanted += [self.group_column] if self.group_column else []
        wanted = list(dict.fromkeys(wanted))
        source.require(wanted, "rows")
        known = self.known_columns
        if known is not None and (extra := [name for name in source.columns if name not in set(known)]):
            raise DataError(f"rows: unknown columns {', '.join(map(repr, extra))}{nearest(extra[0], known)}")
        found = False
        for numbers, batch in source.batches(wanted, batch_rows):
            found = found or len(numbers) > 0
            yield numbers, self._encode(batch, numbers, read)
        if not found:
            raise DataError("expected at least one row, found none")

    def _read_for(self, labels: bool | Sequence[str]) -> dict[str, Label]:
        """The labels to read, by task; without the weights of tasks that are not asked for."""
        if isinstance(labels, bool):
            return self.labels if labels else {}
        asked = check_task_names(labels, list(self.labels))
        spaces = [task.space for task in self.parsed_tasks if task.name in asked and task.space is not None]
        parts = [part for name in [*asked, *spaces] for part in self.labels[name].all_of or ()]
        return {
            name: label if name in asked else dataclasses.replace(label, weight_column=None)
            for name, label in self.labels.items()
            if name in {*asked, *spaces, *parts}
        }

    def _encode(self, batch: Mapping[str, Any], rows: Sequence[int], labels: Mapping[str, Label]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        encoded = {c.name: c.encode(batch[c.name], self.missing_values, rows) for c in self.columns}
        for key, kinds in (("numeric", ("numeric",)), ("categorical", ("categorical",))):
            columns = [encoded[c.name] for c in self.columns if c.kind in kinds]
            if columns:
                out[key] = torch.from_numpy(np.stack(columns, axis=1))
        lists = [c for c in self.columns if isinstance(c, ListColumn)]
        if lists:
            sequences = np.full((len(rows), len(lists), max(c.max_length for c in lists)), -1, np.int64)
            for i, column in enumerate(lists):
                sequences[:, i, : column.max_length] = encoded[column.name]
            out["sequences"] = torch.from_numpy(sequences)
        if labels:
            out["labels"] = self._encode_labels(batch, rows, labels)
            weights = {
                n: label.encode_weights(batch, self.missing_values, rows)
                for n, label in labels.items()
                if label.weight_column
            }
            if weights:
                out["sample_weights"] = {name: torch.from_numpy(values) for name, values in weights.items()}
            if self.group_column:
                out["groups"] = torch.from_numpy(self._groups(batch[self.group_column], rows))
        return out

    def _encode_labels(
        self, batch: Mapping[str, Any], rows: Sequence[int], labels: Mapping[str, Label]
    ) -> dict[str, Tensor]:
        own = {n: label.encode(batch, self.missing_values, rows) for n, label in labels.items() if label.all_of is None}
        for name, label in labels.items():
            if label.all_of is not None:
                parts = np.stack([own[task] for task in label.all_of])
                # One 0 decides, whatever is missing beside it; a product would turn 0 x NaN into NaN.
                own[name] = np.where((parts == 0).any(0), np.float32(0), parts.prod(0))
        for name, label in labels.items():
            own[name] = label.masked(own[name], batch, self.missing_values, rows)
        return {name: torch.from_numpy(np.ascontiguousarray(own[name])) for name in labels}

    def _groups(self, column: Any, rows: Sequence[int]) -> np.ndarray:
        codes, texts = factorise(column, self.missing_values, str(self.group_column))
        if (codes < 0).any():
            raise DataError("expected a group, found none", self.group_column, int(rows[int((codes < 0).argmax())]))
        # A hash of the text, not a running number: the same group in another batch or file gets the same id.
        return pd.util.hash_array(texts.to_numpy(zero_copy_only=False)).view(np.int64)[codes]

    # --- logits -> predictions ---

    def decode(self, logits: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Predictions in the user's units, by column name.

        Args:
            logits: `[B, C]` by task; any subset of the tasks.

        Returns:
            binary: `<task>`, the probability; multiclass: `<task>`, the most likely class as it stood in the table, and
            `<task>/<class>`, probabilities; multilabel: `<task>/<class>`; regression: `<task>` in the column's units.

        Raises:
            UnknownTaskError: logits of a task the processor does not know.
        """
        by_name = {task.name: task for task in self.parsed_tasks}
        if unknown := [name for name in logits if name not in by_name]:
            raise UnknownTaskError(unknown, list(by_name))
        return {
            k: v
            for name, values in logits.items()
            for k, v in decode_task(by_name[name], self.labels[name], values).items()
        }

    def unscale(self, task: str, values: Tensor) -> Tensor:
        """Predictions or labels of a regression task in the column's units, float64; those of other tasks as they are.

        Raises:
            UnknownTaskError: the processor does not know the task.
        """
        if task not in self.labels:
            raise UnknownTaskError([task], list(self.labels))
        label = self.labels[task]
        return label.unscale(values) if label.kind == "regression" else values

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """All that was learnt, as JSON types."""
        return {
            "processor_class": type(self).__name__,
            "processor_type": TYPE,
            "version": VERSION,
            "features": [column.to_dict() for column in self.columns],
            "tasks": self.tasks,
            "labels": [label.to_dict() for label in self.labels.values()],
            "group_column": self.group_column,
            "known_columns": self.known_columns,
            "missing_values": list(self.missing_values),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TabularProcessor":
        """The inverse of `to_dict`.

        Raises:
            DataError: an unknown or missing field, a version of another library release, a value of the wrong type.
        """
        keys = (
            "processor_class",
            "processor_type",
            "version",
            "features",
            "tasks",
            "labels",
            "group_column",
            "known_columns",
            "missing_values",
        )
        fields = check_keys(fields, keys, FILE, keys)
        check_choice(fields["processor_class"], (cls.__name__,), f"{FILE}: processor_class")
        check_choice(fields["processor_type"], (TYPE,), f"{FILE}: processor_type")
        check_choice(fields["version"], (VERSION,), f"{FILE}: version")
        for key in ("features", "tasks", "labels", "missing_values"):
            if not isinstance(fields[key], list):
                raise DataError(f"{FILE}: {key}: expected a list, found {fields[key]!r:.80}")
        if not isinstance(fields["group_column"], str | None):
            raise DataError(f"{FILE}: group_column: expected a text or null, found {fields['group_column']!r:.80}")
        if fields["known_columns"] is not None:
            check_vocabulary(fields["known_columns"], f"{FILE}: known_columns")
        columns: list[Column] = []
        for feature in fields["features"]:
            if not isinstance(feature, dict) or not isinstance(feature.get("name"), str):
                raise DataError(f"{FILE}: expected a feature with a name, found {feature!r:.80}")
            check_choice(feature.get("kind"), COLUMNS, f"{FILE}: feature {feature['name']!r}: kind")
            columns.append(COLUMNS[feature["kind"]].from_dict(feature))
        labels = [Label.from_dict(label) for label in fields["labels"]]
        tasks = parse_tasks(fields["tasks"])
        by_task = {label.task: label for label in labels}
        return cls(columns, tasks, by_task, fields["group_column"], fields["known_columns"], fields["missing_values"])

    def __repr__(self) -> str:
        kinds = [column.kind for column in self.columns]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return f"{type(self).__name__}({counts}; tasks: {', '.join(self.labels)})"


def _concatenate(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return {
        key: _concatenate([p[key] for p in parts])
        if isinstance(first[key], dict)
        else torch.cat([p[key] for p in parts])
        for key in first
    }
