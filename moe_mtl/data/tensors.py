"""Encoded rows in memory, and batches taken from them by index."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TensorTable(Dataset):
    """N encoded rows: a dict of tensors whose first dimension is N, one level of nested dicts (labels by task) allowed.

    A batch is one `index_select` per tensor; no row is ever handled alone. For a `DataLoader` pass a batch sampler that
    yields index tensors and `collate_fn=as_is`.

    Raises:
        ValueError: no tensor, or tensors of different lengths, by name.
    """

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = dict(tensors)
        lengths = {name: tensor.shape[0] for name, tensor in _flat(self.tensors)}
        if not lengths:
            raise ValueError("expected at least one tensor, found none")
        self.num_rows = next(iter(lengths.values()))
        wrong = {name: length for name, length in lengths.items() if length != self.num_rows}
        if wrong:
            raise ValueError(f"expected {self.num_rows} rows as in {next(iter(lengths))!r}, found {wrong}")

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> dict[str, Any]:
        """A batch as a dict. An integer gives one row without the batch dimension; a slice gives views, not copies."""
        if isinstance(index, (int, slice)):
            return _apply(self.tensors, lambda tensor: tensor[index])
        indices = torch.as_tensor(index, dtype=torch.int64)
        return _apply(self.tensors, lambda tensor: tensor.index_select(0, indices))

    def __getitems__(self, indices: Tensor | Sequence[int]) -> dict[str, Any]:
        """What a `DataLoader` calls for a whole batch."""
        return self[torch.as_tensor(indices, dtype=torch.int64)]

    def select(self, chosen: Tensor | Sequence[int]) -> "TensorTable":
        """The table of the rows where a bool mask `[N]` is true, or of the given row numbers."""
        chosen = torch.as_tensor(chosen)
        if chosen.dtype == torch.bool:
            if chosen.shape != (self.num_rows,):
                raise ValueError(f"expected a mask of {self.num_rows} rows, found the shape {list(chosen.shape)}")
            chosen = chosen.nonzero().squeeze(1)
        return TensorTable(self[chosen.to(torch.int64)])


def as_is(batch: dict[str, Any]) -> dict[str, Any]:
    """The `collate_fn` of a `DataLoader` over a `TensorTable`: its batches are ready."""
    return batch


class ShuffledBatches:
    """A batch sampler that yields index tensors; the order depends only on the seed and the epoch.

    A tail shorter than `min_last` joins the batch before it: batch norm cannot be trained on one row.

    Args:
        num_rows: rows to draw from.
        batch_size: rows per batch.
        seed: of the order.
        shuffle: False yields the rows in order.
        min_last: the fewest rows a last batch may have.

    Raises:
        ValueError: no rows, or a batch size below 1.
    """

    drop_last = False

    def __init__(self, num_rows: int, batch_size: int, seed: int = 0, shuffle: bool = True, min_last: int = 2):
        if num_rows < 1:
            raise ValueError(f"expected at least one row, found {num_rows}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.num_rows, self.batch_size, self.seed, self.shuffle, self.min_last = (
            num_rows,
            batch_size,
            seed,
            shuffle,
            min_last,
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, tail = divmod(self.num_rows, self.batch_size)
        return max(full + (tail >= self.min_last if tail else 0), 1)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            # An odd constant keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
            order = torch.randperm(self.num_rows, generator=generator)
        else:
            order = torch.arange(self.num_rows)
        last = len(self) - 1
        for i in range(last):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]
        yield order[last * self.batch_size :]


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _apply(tensors: Mapping[str, Any], take: Any) -> dict[str, Any]:
    return {name: _apply(value, take) if isinstance(value, Mapping) else take(value) for name, value in tensors.items()}
