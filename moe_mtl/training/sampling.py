"""Batches for training. Their order depends on the seed and the epoch alone: a resumed run sees the same rows.

Shapes: `N` rows of a table.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.images import ImageTable
from ..data.tensors import ShuffledBatches, TensorTable, as_is
from ..tasks import Task
from .metrics import counted_rows


def rows_by_task(table: TensorTable | ImageTable, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """The rows that count for each task of positive weight that the table has labels of: bool `[N]` by task."""
    trained = [task for task in tasks if task.weight > 0]
    if isinstance(table, ImageTable):
        known = {task.name for task in table.tasks}
        return {task.name: table.present(task.name) for task in trained if task.name in known}
    labels = table.tensors["labels"]
    return {task.name: counted_rows(task, labels) for task in trained if task.name in labels}


class TaskBatches:
    """Batches whose rows all carry the label of one task; yields `(task, index tensor)`.

    An epoch has as many batches of each task, on average, as the temperature asks for, and as many in all as the
    labelled rows fill. Each task walks through a permutation of its own rows, and begins a new one when it is used up.

    Args:
        rows: task -> which rows count for it, bool `[N]`; one without any is an error. Any other groups of rows can
            stand in the place of tasks.
        batch_size: rows per batch.
        temperature: tasks are drawn with probability proportional to rows^(1/temperature).
        seed: of the order.

    Raises:
        ValueError: a task that no row is labelled for.
    """

    def __init__(self, rows: Mapping[str, Tensor], batch_size: int, temperature: float, seed: int):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.rows = {name: chosen_N.nonzero().squeeze(1) for name, chosen_N in rows.items()}
        empty = [name for name, rows in self.rows.items() if len(rows) == 0]
        if empty:
            raise ValueError(f"no training row is labelled for {', '.join(empty)}")
        sizes = torch.tensor([len(rows) for rows in self.rows.values()], dtype=torch.float64)
        self.probabilities = sizes.pow(1 / temperature) / sizes.pow(1 / temperature).sum()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for rows in self.rows.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
        names = list(self.rows)
        drawn = torch.multinomial(self.probabilities, len(self), replacement=True, generator=generator)
        left = {name: torch.empty(0, dtype=torch.int64) for name in names}
        for choice in drawn.tolist():
            name = names[choice]
            if len(left[name]) < 2:  # a batch norm cannot be trained on one row
                rows = self.rows[name]
                left[name] = rows[torch.randperm(len(rows), generator=generator)]
            yield name, left[name][: self.batch_size]
            left[name] = left[name][self.batch_size :]


class TaskRows(Dataset):
    """A table read through `TaskBatches`: a batch holds one task's labels and asks for that task only.

    Args:
        table: the rows.
        tasks: the table's.
        groups: what is drawn in the place of tasks: name -> the tasks that a batch of it trains together.
    """

    def __init__(
        self,
        table: TensorTable | ImageTable,
        tasks: Sequence[Task],
        groups: Mapping[str, Sequence[str]] | None = None,
    ):
        self.table = table
        self.groups = {task.name: [task.name] for task in tasks} if groups is None else dict(groups)
        # The labels of a task's space decide which of its rows count.
        spaces = {task.name: task.space for task in tasks}
        self.needed = {group: {*names, *(spaces[name] for name in names)} for group, names in self.groups.items()}

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, chosen: tuple[str, Tensor]) -> dict[str, Any]:
        group, index = chosen
        batch = self.table.__getitems__(index)
        for targets in ("labels", "sample_weights"):
            if targets in batch:
                batch[targets] = {name: values for name, values in batch[targets].items() if name in self.needed[group]}
        return {**batch, "tasks": list(self.groups[group])}


class BatchLoader(DataLoader):
    """A DataLoader over whole batches. Of n processes each takes every n-th; an incomplete last round is left out."""

    def __init__(
        self,
        dataset: Dataset,
        batches: ShuffledBatches | TaskBatches,
        pin_memory: bool,
        process: int = 0,
        processes: int = 1,
    ):
        share: Any = batches if processes == 1 else _Share(batches, process, processes)
        table = dataset.table if isinstance(dataset, TaskRows) else dataset
        if isinstance(table, ImageTable):
            share = _Told(share, table)
        self.batches = share
        # Its own generator: a DataLoader draws a seed each epoch, from the one that dropout uses unless told otherwise.
        super().__init__(
            dataset, batch_sampler=share, collate_fn=_as_is, pin_memory=pin_memory, generator=torch.Generator()
        )

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls it before each pass."""
        self.batches.set_epoch(epoch)


def _as_is(batch: Any) -> Any:
    return as_is(batch)


class _Told:
    """Batches that tell a table of pictures which pass it is, as its augmentation differs from pass to pass.

    Not the loader does: a resumed epoch has another one, made by accelerate, around the same batches.
    """

    def __init__(self, batches: Any, table: ImageTable):
        self.batches, self.table = batches, table

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
        self.table.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Share:
    def __init__(self, batches: ShuffledBatches | TaskBatches, process: int, processes: int):
        self.batches, self.process, self.processes = batches, process, processes

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches) // self.processes

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.batches):
            if i < len(self) * self.processes and i % self.processes == self.process:
                yield batch
