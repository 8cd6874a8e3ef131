"""Mixed: several data sets of pictures in one run, each with its own labels; what one lacks is missing there.

    data:
      name: mixed
      parts: [{name: photo-tiles, tasks: [edges, normals]}, {name: digit-pairs, size: 64}]

Pictures must be of one size. With `train.task_sampling: {by: data_set}` a batch is of one data set, which alternates
at random: alternating gradient descent, as in IMP (Akbari et al., "Alternating Gradient Descent and Mixture-of-Experts
for Integrated Multimodal Perception", NeurIPS 2023, section 3.2).

Shapes: `N` pictures, `B` pictures of a batch.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import KINDS
from ..tasks import Task
from .augmentation import Augmentation
from .errors import DataError
from .images import ImageSplits, ImageTable, rows_of
from .splits import PARTS, content_hash
from .vision_processor import VisionProcessor


@dataclass(frozen=True)
class Options:
    """Options of several data sets in one.

    Attributes:
        parts: of each its `name` and its options. A task that several have must be the same in all.
    """

    parts: tuple[Mapping[str, Any], ...]


def load(options: Options) -> ImageSplits:
    """The pictures of all parts, train with train, validation with validation, test with test.

    Raises:
        DataError: fewer than two parts, one that is not of pictures, two of one name, another size of pictures, or a
            task that differs between parts.
    """
    from . import is_images
    from . import load as load_one

    names = [part.get("name") for part in options.parts]
    for name in names:
        if not isinstance(name, str) or name == "mixed" or not is_images(name):
            raise DataError(f"mixed: parts: expected data sets of pictures, found {name!r}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"mixed: parts: expected two data sets or more, each once, found {names}")
    loaded: dict[str, Any] = {}
    for part in options.parts:
        loaded[part["name"]] = load_one(part["name"], **{k: v for k, v in part.items() if k != "name"})
    processor = _joined({name: splits.processor for name, splits in loaded.items()})
    tables = {
        part: JoinedImages({name: splits.parts()[part] for name, splits in loaded.items()}, processor) for part in PARTS
    }
    info = _told({name: splits.info for name, splits in loaded.items()}, tables)
    return MixedSplits(**tables, tasks=processor.parsed_tasks, processor=processor, info=info)


def _told(infos: Mapping[str, Mapping[str, Any]], tables: Mapping[str, ImageTable]) -> dict[str, Any]:
    """The info of all, from each data set's."""
    return {
        "name": "mixed",
        "licence": "; ".join(f"{name}: {info['licence']}" for name, info in infos.items()),
        "sha256": content_hash(*(_bytes(info["sha256"]) for info in infos.values())),
        "rows": rows_of(tables),
        "parts": dict(infos),
    }


class MixedSplits(ImageSplits):
    """Several data sets as one; of some tasks alone, only those that have one of them."""

    def _info_of(self, parts: Mapping[str, ImageTable]) -> dict[str, Any]:
        train = parts["train"]
        assert isinstance(train, JoinedImages)
        return _told({name: self.info["parts"][name] for name in train.tables}, parts)


class JoinedImages(ImageTable):
    """The pictures of several tables, one table's after the other's; each keeps its own augmentation.

    Args:
        tables: by name.
        processor: with the tasks of all; its normalisation takes the place of the tables' own.
    """

    def __init__(self, tables: Mapping[str, ImageTable], processor: VisionProcessor):
        super().__init__(processor)
        self.tables = {name: table.with_processor(_own(table, processor)) for name, table in tables.items()}
        self.table_N = torch.cat([torch.full((len(t),), i) for i, t in enumerate(self.tables.values())])
        self.row_N = torch.cat([torch.arange(len(table)) for table in self.tables.values()])

    @property
    def sources(self) -> dict[str, tuple[Tensor, list[str]]]:
        """Of each table which pictures are its own, bool `[N]`, and the names of its tasks."""
        return {
            name: (self.table_N == i, [task.name for task in table.tasks])
            for i, (name, table) in enumerate(self.tables.items())
        }

    def __len__(self) -> int:
        return len(self.row_N)

    def present(self, name: str) -> Tensor:
        self._known(name)
        present_N = torch.zeros(len(self), dtype=torch.bool)
        for i, table in enumerate(self.tables.values()):
            if name in [task.name for task in table.tasks]:
                own_N = self.table_N == i
                present_N[own_N] = table.present(name)[self.row_N[own_N]]
        return present_N

    def __getitems__(self, indices: Tensor | Sequence[int]) -> dict[str, Any]:
        """With each table's own augmentation."""
        rows = self._rows(indices)
        found = {name: table.__getitems__(own) for name, table, own in self._dealt(rows)}
        pixels = {name: batch["pixel_values"] for name, batch in found.items()}
        return {
            "pixel_values": self._put(rows, pixels),
            "labels": self._labels(rows, {name: batch["labels"] for name, batch in found.items()}),
        }

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for table in self.tables.values():
            table.set_epoch(epoch)

    def with_augmentation(self, augmentation: Augmentation | None) -> "JoinedImages":
        """All tables changed alike."""
        joined = copy(self)
        joined.tables = {name: table.with_augmentation(augmentation) for name, table in self.tables.items()}
        return joined

    def with_processor(self, processor: VisionProcessor) -> "JoinedImages":
        """For another processor; tables that have none of its tasks are left out."""
        wanted = {task.name for task in processor.parsed_tasks}
        for name in wanted:
            self._known(name)
        kept = [i for i, t in enumerate(self.tables.values()) if wanted & {task.name for task in t.tasks}]
        joined = copy(self)
        names = list(self.tables)
        joined.processor = processor
        joined.tables = {names[i]: self.tables[names[i]] for i in kept}
        joined.tables = {n: table.with_processor(_own(table, processor)) for n, table in joined.tables.items()}
        stays_N = torch.isin(self.table_N, torch.tensor(kept))
        joined.table_N = torch.searchsorted(torch.tensor(kept), self.table_N[stays_N])
        joined.row_N = self.row_N[stays_N]
        return joined

    def _read(self, rows: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        found = {name: table._read(own, training) for name, table, own in self._dealt(rows)}
        pixels = {name: of.float() / 255 if of.dtype == torch.uint8 else of for name, (of, _) in found.items()}
        return self._put(rows, pixels), self._labels(rows, {name: labels for name, (_, labels) in found.items()})

    def _select(self, rows: Tensor) -> "JoinedImages":
        joined = copy(self)
        joined.table_N, joined.row_N = self.table_N[rows], self.row_N[rows]
        return joined

    def _dealt(self, rows: Tensor) -> list[tuple[str, ImageTable, Tensor]]:
        """The tables that a batch has pictures of, and which of their own."""
        dealt = []
        for i, (name, table) in enumerate(self.tables.items()):
            own = self.row_N[rows[self.table_N[rows] == i]]
            if len(own):
                dealt.append((name, table, own))
        return dealt

    def _put(self, rows: Tensor, values: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Each table's values in the places of its pictures."""
        if out is None:
            first = next(iter(values.values()), torch.empty(0, 3, *self.processor.image_size))
            out = first.new_empty(len(rows), *first.shape[1:])
        for i, name in enumerate(self.tables):
            if name in values:
                out[self.table_N[rows] == i] = values[name]
        return out

    def _labels(self, rows: Tensor, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        out = {}
        for task in self.tasks:
            own = {name: labels[task.name] for name, labels in found.items() if task.name in labels}
            out[task.name] = self._put(rows, own, self._missing(task, len(rows)))
        return out

    def _missing(self, task: Task, pictures: int) -> Tensor:
        """Labels of pictures that have none."""
        height, width = self.processor.image_size
        shape: tuple[int, ...] = (pictures,)
        if task.dense:
            shape = (pictures, 3, height, width) if task.kind == "normals" else (pictures, height, width)
        elif task.kind != "multiclass" and task.num_outputs > 1:
            shape = (pictures, task.num_outputs)
        return torch.full(shape, task.missing, dtype=KINDS[task.kind].label_dtype)


def _joined(processors: Mapping[str, VisionProcessor]) -> VisionProcessor:
    """One processor with the tasks of all, and the first one's normalisation."""
    first_name, first = next(iter(processors.items()))
    tasks: dict[str, Task] = {}
    classes: dict[str, Any] = {}
    units: dict[str, str] = {}
    for name, one in processors.items():
        if one.image_size != first.image_size:
            raise DataError(
                f"mixed: expected pictures of {list(first.image_size)} as in {first_name}, found "
                f"{list(one.image_size)} in {name}"
            )
        for task in one.parsed_tasks:
            told = (task, one.classes.get(task.name), one.units.get(task.name))
            earlier = tasks.get(task.name)
            if earlier and told != (earlier, classes.get(task.name), units.get(task.name)):
                raise DataError(f"mixed: task {task.name!r}: expected the same in all parts, found another in {name}")
            tasks[task.name] = task
        classes |= one.classes
        units |= one.units
    mean, std = first.image_mean, first.image_std
    return VisionProcessor(first.image_size, list(tasks.values()), classes, units, mean, std, first.fit)


def _own(table: ImageTable, processor: VisionProcessor) -> VisionProcessor:
    """What a table keeps of its processor: its tasks among the joint ones, and how it fits pictures."""
    known = [task.name for task in table.tasks]
    joint = processor.for_tasks([task.name for task in processor.parsed_tasks if task.name in known])
    return VisionProcessor(
        joint.image_size,
        joint.parsed_tasks,
        joint.classes,
        joint.units,
        joint.image_mean,
        joint.image_std,
        table.processor.fit,
    )


def _bytes(sha256: str) -> Any:
    import numpy as np

    return np.frombuffer(sha256.encode(), np.uint8)
