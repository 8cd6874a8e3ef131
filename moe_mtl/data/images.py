"""Pictures with several labels, in memory or in files, and batches taken from them by index.

Shapes: `N` pictures, `B` pictures of a batch, `H`, `W` height and width of the model's input in pixels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..tasks import Task, UnknownTaskError, check_task_names
from .augmentation import Augmentation
from .errors import DataError
from .vision_processor import Picture, VisionProcessor, pixels_of


class ImageTable(Dataset, ABC):
    """N pictures with labels; `table[rows]` as they are, `table.__getitems__(rows)` as training sees them.

    Both give `pixel_values` float32 `[B, 3, H, W]`, normalised, and `labels` by task: maps `[B, H, W]` (normals `[B, 3,
    H, W]`) or one per picture `[B]`. For a `DataLoader` pass a batch sampler that yields index tensors and
    `collate_fn=as_is`.

    Attributes:
        processor: normalises, and says what the model's input is.
        tasks: whose labels are given.
        augmentation: what is changed in training, or None.
        epoch: with `seed` and the row numbers it decides on the changes: a resumed run sees the same pictures.
    """

    def __init__(self, processor: VisionProcessor, augmentation: Augmentation | None = None, seed: int = 0):
        self.processor, self.augmentation, self.seed = processor, augmentation, seed
        self.epoch = 0

    @property
    def tasks(self) -> list[Task]:
        return self.processor.parsed_tasks

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def present(self, name: str) -> Tensor:
        """Which pictures carry a label of a task: bool `[N]`. Raises UnknownTaskError if there is no such task."""

    @abstractmethod
    def _read(self, rows: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels `[B, 3, H, W]`, uint8 or float32 in [0, 1], and labels."""

    @abstractmethod
    def _select(self, rows: Tensor) -> Self:
        """The table of some pictures."""

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> dict[str, Any]:
        """A batch without augmentation. An integer gives one picture without the batch dimension."""
        if isinstance(index, int):
            one = self[torch.tensor([index])]
            return {
                "pixel_values": one["pixel_values"][0],
                "labels": {name: values[0] for name, values in one["labels"].items()},
            }
        pixels_BCHW, labels = self._read(self._rows(index), training=False)
        return {"pixel_values": self.processor.normalise(pixels_BCHW), "labels": labels}

    def __getitems__(self, indices: Tensor | Sequence[int]) -> dict[str, Any]:
        """What a `DataLoader` calls for a whole batch: with augmentation, where the table has one."""
        rows = self._rows(indices)
        if self.augmentation is None:
            return self[rows]
        pixels_BCHW, labels = self._read(rows, training=True)
        if pixels_BCHW.dtype == torch.uint8:
            pixels_BCHW = pixels_BCHW.float() / 255
        pixels_BCHW, labels = self.augmentation(pixels_BCHW, labels, self.tasks, self._seed(rows))
        return {"pixel_values": self.processor.normalise(pixels_BCHW), "labels": labels}

    def set_epoch(self, epoch: int) -> None:
        """Chooses the changes of the next pass."""
        self.epoch = epoch

    def with_augmentation(self, augmentation: Augmentation | None) -> Self:
        """The same pictures, changed otherwise in training."""
        table = copy(self)
        table.augmentation = augmentation
        return table

    def with_processor(self, processor: VisionProcessor) -> Self:
        """The same pictures for another processor, as `for_tasks` makes it: its tasks, its normalisation."""
        for task in processor.parsed_tasks:
            own = self.processor.task(task.name)
            told = [
                (of.kind, of.num_outputs, by.classes.get(of.name), by.units.get(of.name))
                for of, by in ((task, processor), (own, self.processor))
            ]
            if told[0] != told[1]:
                raise DataError(
                    f"task {task.name!r}: expected kind, outputs, classes and units {told[0]!r:.200}, as the model has "
                    f"them, found those of the data, {told[1]!r:.200}"
                )
        table = copy(self)
        table.processor = processor
        return table

    def select(self, chosen: Tensor | Sequence[int]) -> Self:
        """The table of the pictures where a bool mask `[N]` is true, or of the given row numbers."""
        chosen = torch.as_tensor(chosen)
        if chosen.dtype == torch.bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"expected a mask of {len(self)} pictures, found the shape {list(chosen.shape)}")
            chosen = chosen.nonzero().squeeze(1)
        return self._select(self._rows(chosen))

    def _rows(self, index: slice | Tensor | Sequence[int]) -> Tensor:
        if isinstance(index, slice):
            return torch.arange(*index.indices(len(self)))
        rows = torch.as_tensor(index, dtype=torch.int64)
        if rows.numel() and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"expected pictures in [0, {len(self) - 1}], found {int(rows.min())} to {int(rows.max())}")
        return rows % max(len(self), 1)

    def _seed(self, rows: Tensor) -> int:
        content = np.array([self.seed, self.epoch, *rows.tolist()], "<i8").tobytes()
        return int.from_bytes(hashlib.sha256(content).digest()[:7], "little")

    def _known(self, name: str) -> Task:
        """Raises UnknownTaskError unless the table has the task."""
        return self.processor.task(name)


class TensorImages(ImageTable):
    """Pictures in memory; a batch is one `index_select` per tensor.

    Args:
        pixels_N3HW: uint8, what a model sees.
        labels: task -> labels of all pictures, in the task's type; NaN or -100 is missing.
        processor: of the data set.
        augmentation: what is changed in training.
        clean_N3HW: uint8, what the changes of training begin with instead: pictures to which noise is added anew.
        seed: of the changes.
        groups_N: of each picture the number, from 0, of the larger one that it was cut from; None if each is whole.

    Raises:
        ValueError: pictures or labels of another shape or type, by name.
    """

    def __init__(
        self,
        pixels_N3HW: Tensor,
        labels: Mapping[str, Tensor],
        processor: VisionProcessor,
        augmentation: Augmentation | None = None,
        clean_N3HW: Tensor | None = None,
        seed: int = 0,
        groups_N: Tensor | None = None,
    ):
        super().__init__(processor, augmentation, seed)
        expected = (len(pixels_N3HW), 3, *processor.image_size)
        for name, pixels in (("pixels", pixels_N3HW), ("clean", clean_N3HW)):
            if pixels is not None and (pixels.dtype != torch.uint8 or tuple(pixels.shape) != expected):
                raise ValueError(f"{name}: expected uint8 {list(expected)}, found {pixels.dtype} {list(pixels.shape)}")
        for task in self.tasks:
            if task.name not in labels:
                raise ValueError(f"labels: expected those of task {task.name!r}, found {', '.join(labels) or 'none'}")
            if len(labels[task.name]) != len(pixels_N3HW):
                raise ValueError(
                    f"labels of task {task.name!r}: expected {len(pixels_N3HW)}, found {len(labels[task.name])}"
                )
        self.pixels_N3HW, self.labels, self.clean_N3HW = pixels_N3HW, dict(labels), clean_N3HW
        self.groups_N = groups_N

    def __len__(self) -> int:
        return len(self.pixels_N3HW)

    def present(self, name: str) -> Tensor:
        return self._known(name).labelled(self.labels[name])

    def _read(self, rows: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.clean_N3HW if training and self.clean_N3HW is not None else self.pixels_N3HW
        return pixels.index_select(0, rows), {task.name: self.labels[task.name][rows] for task in self.tasks}

    def _select(self, rows: Tensor) -> "TensorImages":
        table = copy(self)
        table.pixels_N3HW = self.pixels_N3HW[rows]
        table.clean_N3HW = None if self.clean_N3HW is None else self.clean_N3HW[rows]
        table.groups_N = None if self.groups_N is None else self.groups_N[rows].unique(return_inverse=True)[1]
        table.labels = {name: values[rows] for name, values in self.labels.items()}
        return table


def _always(name: str) -> bool:
    return True


@dataclass(frozen=True)
class LabelFiles:
    """Label maps of one task in files.

    Attributes:
        read: name of a picture -> its map at the picture's own size, `[H, W]` or, of normals, `[3, H, W]`; what is
            missing is NaN or -100.
        present: name of a picture -> whether it has a label, without reading a map; by default all have.
    """

    read: Callable[[str], np.ndarray]
    present: Callable[[str], bool] = _always


class FileImages(ImageTable):
    """Pictures and label maps in files, read when a batch asks for them and fitted to the model's input.

    Args:
        names: of the pictures.
        picture: name -> its file.
        labels: task -> how its maps are read.
        processor: of the data set.
        augmentation: what is changed in training.
        seed: of the changes.
    """

    def __init__(
        self,
        names: Sequence[str],
        picture: Callable[[str], Picture],
        labels: Mapping[str, LabelFiles],
        processor: VisionProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        super().__init__(processor, augmentation, seed)
        self.names, self.picture, self.labels = list(names), picture, dict(labels)
        for task in self.tasks:
            if task.name not in labels:
                raise ValueError(f"labels: expected those of task {task.name!r}, found {', '.join(labels) or 'none'}")

    def __len__(self) -> int:
        return len(self.names)

    def present(self, name: str) -> Tensor:
        self._known(name)
        return torch.tensor([self.labels[name].present(of) for of in self.names], dtype=torch.bool)

    def _read(self, rows: Tensor, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        read = [self._one(self.names[row]) for row in rows.tolist()]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in read]).transpose(0, 3, 1, 2).copy())
        return pixels, {
            task.name: torch.from_numpy(np.stack([maps[task.name] for _, maps in read])) for task in self.tasks
        }

    def _one(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        pixels = pixels_of(self.picture(name))
        maps = {}
        for task in self.tasks:
            dtype = np.int64 if isinstance(task.missing, int) else np.float32
            shape = (3, *pixels.shape[:2]) if task.kind == "normals" else pixels.shape[:2]
            if self.labels[task.name].present(name):
                label = self.labels[task.name].read(name)
            else:
                label = np.full(shape, task.missing)
            if label.shape != shape:
                raise DataError(
                    f"picture {name!r}, task {task.name!r}: expected a label map {list(shape)}, as large as "
                    f"the picture, found {list(label.shape)}"
                )
            maps[task.name] = self.processor.place_map(label.astype(dtype), task.missing)
        return self.processor.place(pixels), maps

    def _select(self, rows: Tensor) -> "FileImages":
        table = copy(self)
        table.names = [self.names[row] for row in rows.tolist()]
        return table


@dataclass(frozen=True)
class ImageSplits:
    """A data set of pictures, cut into three.

    Attributes:
        train, validation, test: the pictures; `train` has the augmentation, if there is any.
        tasks: what is predicted, with the field's weights.
        processor: what the model's input is.
        info: name, licence, sha256 of the content, pictures per part, and what else is worth telling.

    Raises:
        DataError: a task that no training picture has a label of.
    """

    train: ImageTable
    validation: ImageTable
    test: ImageTable
    tasks: list[Task]
    processor: VisionProcessor
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self.tasks:
            if not bool(self.train.present(task.name).any()):
                raise DataError(
                    f"task {task.name!r}: expected a training picture with a label, found none in {len(self.train)}"
                )

    def parts(self) -> dict[str, ImageTable]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def only(self, tasks: Sequence[str]) -> "ImageSplits":
        """The same pictures with the labels of some tasks. Raises UnknownTaskError for one that does not exist."""
        names = check_task_names(tasks, [task.name for task in self.tasks])
        processor = self.processor.for_tasks(names)
        parts = {name: part.with_processor(processor) for name, part in self.parts().items()}
        return type(self)(**parts, tasks=processor.parsed_tasks, processor=processor, info=self._info_of(parts))

    def _info_of(self, parts: Mapping[str, ImageTable]) -> dict[str, Any]:
        """What is told of the pictures that are left: some tables drop those without a label."""
        return self.info | {"rows": rows_of(parts)}


def rows_of(parts: Mapping[str, ImageTable]) -> dict[str, int]:
    """Pictures per part."""
    return {name: len(part) for name, part in parts.items()}


def check_tasks(name: str, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """The tasks a data set is asked for, in its own order. Raises DataError for one it does not have, or none."""
    try:
        return check_task_names(list(tasks), list(known))
    except (UnknownTaskError, ValueError) as error:
        raise DataError(f"{name}: {error}") from None
