"""Tensors in a file of weights, read into memory of their own, where each begins where vector instructions like it.

What is mapped from a file instead counts as held, begins anywhere, so that sums round otherwise on some processors, and
ends the process where the file is cut short.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import CheckpointError, file_state


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file.

    Attributes:
        name: of the tensor.
        path: of the file.
        offset: of the tensor in it, in bytes.
        shape: of the tensor.
        dtype: of the tensor.
        state: what told the file apart when its header was read: see `file_state`.

    Raises:
        CheckpointError: on reading, the file is gone, or is no longer the one whose header was read.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """The tensor, or rows of it in the order given."""
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        tensor = torch.empty(shape, dtype=self.dtype, device="cpu")
        data = _bytes(tensor)
        if rows is None:
            self._fill([(0, data)])
        else:
            self._fill((row, data[i * self.row_bytes : (i + 1) * self.row_bytes]) for i, row in enumerate(rows))
        return tensor

    def read_row(self, row: int, into: Tensor) -> None:
        """Fills `into`, bytes on the CPU, with a row."""
        self._fill([(row, _bytes(into))])

    def _fill(self, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Reads from the beginning of each row as much as its buffer takes."""
        try:
            with open(self.path, "rb", buffering=0, opener=_open_at_once) as file:
                found, whole = file_state(os.fstat(file.fileno())), True
                if found != self.state:  # perhaps no file any more that could be read to an end
                    parts = ()
                for row, buffer in parts:
                    file.seek(self.offset + row * self.row_bytes)
                    filled = 0
                    while got := file.readinto(buffer[filled:]):
                        filled += got
                    whole &= filled == len(buffer)
                found = file_state(os.fstat(file.fileno())) if found == self.state else found
        except OSError as error:
            what = "was removed" if isinstance(error, FileNotFoundError) else f"cannot be read any more ({error})"
            raise CheckpointError(f"{self.path} {what} while its weights were in use; load the model anew") from None
        if found != self.state or not whole:
            raise CheckpointError(f"{self.path} changed while its weights were in use; load the model anew")


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that stands where the file was must not make anyone wait."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
