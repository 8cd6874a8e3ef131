"""Sparse experts whose weights stay on disk: computed one after the other, the next being read meanwhile.

M³ViT's computation reordering (Fan et al., NeurIPS 2022, section 3.3; Sarkar et al., "Edge-MoE", ICCAD 2023, section 4)
on ordinary machines: all tokens are routed first; then each expert that has a queue of tokens computes all of it at
once, while a thread reads the next one. At most two experts are in memory, however many there are and in however many
layers.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `H` expert hidden width.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import CheckpointError

ALIGNMENT = 64  # bytes, so that each tensor of an expert starts where vector instructions like it


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor in a file, which are read without being mapped: what is mapped counts as held.

    Attributes:
        name: of the tensor.
        path: of the file.
        offset: of the tensor in it, in bytes.
        shape: of the tensor.
        dtype: of the tensor.
        state: what told the file apart when its header was read: see `file_state`.
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

    def read(self, row: int, into: Tensor) -> None:
        """Fills `into`, bytes on the CPU, with a row.

        Raises:
            CheckpointError: the file is gone, or is no longer the one whose header was read.
        """
        buffer, filled = memoryview(into.numpy()), 0  # type: ignore[arg-type]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + row * self.row_bytes)
                while got := file.readinto(buffer[filled:]):
                    filled += got
                found = file_state(os.fstat(file.fileno()))
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} was removed while its experts were in use; load the model anew"
            ) from None
        if found != self.state or filled < self.row_bytes:
            raise CheckpointError(f"{self.path} changed while its experts were in use; load the model anew")


def file_state(stat: os.stat_result) -> tuple[int, ...]:
    """What differs once a file was written to, or another one has its name."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass
class Slot:
    """Room for one expert, of any layer.

    Attributes:
        host: bytes that are read into; pinned where they go on to a device.
        device: where it is computed; the same as `host` on a CPU.
        copied, used: of a device: the copy to it, and the last product with it.
    """

    host: Tensor
    device: Tensor
    copied: Any = None
    used: Any = None


class ExpertStream:
    """Two slots and a thread that reads, shared by all layers of a model.

    Args:
        expert_bytes: of the largest expert.
    """

    def __init__(self, expert_bytes: int):
        self.expert_bytes = expert_bytes
        self.lock = threading.Lock()
        self.slots: list[Slot] = []
        self._process = os.getpid()
        self._reader: ThreadPoolExecutor | None = None
        self._side: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStream":
        return ExpertStream(self.expert_bytes)

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """One layer at a time has the slots; they are made when they are first needed."""
        if self._process != os.getpid():  # a fork has neither the thread that reads nor anyone to give the lock back
            self.__init__(self.expert_bytes)  # type: ignore[misc]
        with self.lock:
            if not self.slots or self.slots[0].device.device != device:
                with torch.inference_mode(False):  # else they could not be written to outside of it
                    self.slots = [self._slot(device) for _ in range(2)]
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "experts")
            yield

    def fetch(self, number: int, read: Callable[[Tensor], None]) -> "Future[Slot]":
        """Begins to read the `number`-th expert of a turn; whatever was in its slot must have been computed."""
        assert self._reader is not None
        return self._reader.submit(self._fill, self.slots[number % 2], read)

    def ready(self, slot: Slot) -> Tensor:
        """The bytes of a slot, for what is computed next."""
        if slot.copied is not None:
            torch.cuda.current_stream(slot.device.device).wait_event(slot.copied)
        return slot.device

    def done(self, slot: Slot) -> None:
        """Says that all products with a slot were begun."""
        if slot.copied is not None:
            slot.used = torch.cuda.current_stream(slot.device.device).record_event()

    def _slot(self, device: torch.device) -> Slot:
        on_device = device.type == "cuda"
        host = torch.empty(self.expert_bytes, dtype=torch.uint8, device="cpu", pin_memory=on_device)
        if not on_device:
            return Slot(host, host)
        if self._side is None or self._side.device != device:
            self._side = torch.cuda.Stream(device)
        held = torch.empty(self.expert_bytes, dtype=torch.uint8, device=device)
        self._side.wait_stream(torch.cuda.current_stream(device))  # which may still use what that memory was before
        return Slot(host, held)

    def _fill(self, slot: Slot, read: Callable[[Tensor], None]) -> Slot:
        if slot.copied is not None:
            slot.copied.synchronize()  # before what it copies from is written over
        read(slot.host)
        if slot.device is not slot.host:
            with torch.cuda.stream(self._side):
                if slot.used is not None:
                    self._side.wait_event(slot.used)  # before what it computes with is written over
                slot.device.copy_(slot.host, non_blocking=True)
                slot.copied = self._side.record_event()
        return slot


class StreamedExperts(nn.Module):
    """What `SparseExperts` computes, `FFN_e(x) = W2_e gelu(W1_e x + b1_e) + b2_e`, from weights that are not held.

    Equal bit for bit to `SparseExperts` with backend `torch` on a CPU; for evaluation alone.

    Args:
        stored: `w_up`, `b_up`, `w_down`, `b_down` in the file.
        rows: which of their rows are the experts of this layer.
        stream: of the model.

    Raises:
        RuntimeError: in training, or where a gradient is asked for.
        CheckpointError: the file changed or is gone.
    """

    def __init__(self, stored: Mapping[str, StoredRows], rows: Sequence[int], stream: ExpertStream):
        super().__init__()
        self.stored, self.rows, self.stream = dict(stored), list(rows), stream

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through its experts, and their weighted sum: `[N, D]`."""
        if self.training or (torch.is_grad_enabled() and (x_ND.requires_grad or weights_NK.requires_grad)):
            raise RuntimeError(
                "expected evaluation without gradients, found training: offloaded experts cannot be trained; load the "
                "model without offload_experts"
            )
        out_NO = x_ND.new_zeros(len(x_ND), self.stored["w_down"].shape[1])
        queue = torch.bincount(indices_NK.flatten(), minlength=len(self.rows)).nonzero().flatten().tolist()
        with self.stream.turn(x_ND.device):
            reading = self._fetch(0, queue[0])
            for i, expert in enumerate(queue):
                slot = reading.result()
                try:
                    if i + 1 < len(queue):
                        reading = self._fetch(i + 1, queue[i + 1])
                    w = self._tensors(self.stream.ready(slot), x_ND.dtype)
                    tokens, k = (indices_NK == expert).nonzero(as_tuple=True)
                    y = F.linear(F.gelu(F.linear(x_ND[tokens], w["w_up"], w["b_up"])), w["w_down"], w["b_down"])
                    out_NO.index_add_(0, tokens, (y * weights_NK[tokens, k].unsqueeze(-1)).to(out_NO.dtype))
                    self.stream.done(slot)
                except BaseException:
                    with contextlib.suppress(Exception):
                        reading.result()  # nobody else may have the slots while they are written to
                    raise
        return out_NO

    def check(self) -> None:
        """Raises CheckpointError for an expert with a value that is not finite; reads all of them, one at a time."""
        host = torch.empty(self.stream.expert_bytes, dtype=torch.uint8, device="cpu")
        for expert in range(len(self.rows)):
            self._read(expert, host)
            for name, tensor in self._tensors(host, None).items():
                if not tensor.isfinite().all():
                    stored = self.stored[name]
                    raise CheckpointError(
                        f"expected finite weights, found NaN or infinite values in {stored.name} of {stored.path}"
                    )

    def _fetch(self, number: int, expert: int) -> "Future[Slot]":
        return self.stream.fetch(number, lambda host: self._read(expert, host))

    def _read(self, expert: int, host: Tensor) -> None:
        for name, (start, stop) in places(self.stored).items():
            self.stored[name].read(self.rows[expert], host[start:stop])

    def _tensors(self, held: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The expert that a slot holds."""
        found = {}
        for name, (start, stop) in places(self.stored).items():
            stored = self.stored[name]
            found[name] = held[start:stop].view(stored.dtype).view(stored.shape[1:]).to(dtype or stored.dtype)
        return found

    def extra_repr(self) -> str:
        up = self.stored["w_up"]
        return f"experts={len(self.rows)}, dim={up.shape[2]}, hidden={up.shape[1]}, file={up.path.name}"


def places(stored: Mapping[str, StoredRows]) -> dict[str, tuple[int, int]]:
    """Where each tensor of one expert is in a slot: its first byte, and the one after its last."""
    found, start = {}, 0
    for name, rows in stored.items():
        found[name] = start, start + rows.row_bytes
        start += -(-rows.row_bytes // ALIGNMENT) * ALIGNMENT
    return found


def expert_bytes(stored: Mapping[str, StoredRows]) -> int:
    """What a slot for one expert takes."""
    return max(stop for _, stop in places(stored).values())
