"""Weights that stay on disk: sparse experts, computed one after the other, the next being read meanwhile; and heads of
tasks, each of which is read when it is called.

M³ViT's computation reordering (Fan et al., NeurIPS 2022, section 3.3; Sarkar et al., "Edge-MoE", ICCAD 2023, section 4)
on ordinary machines: all tokens are routed first; then each expert that has a queue of tokens computes all of it at
once, while a thread reads the next one. At most two experts are in memory, however many there are and in however many
layers.

Shapes: `N` tokens, `D` width, `O` output width, `E` experts, `K` experts chosen per token, `H` width of an expert's
hidden layer or of a head.
"""

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import CheckpointError
from ..stored import StoredTensor
from .attention_experts import attend

ALIGNMENT = 64  # bytes, so that each tensor of an expert starts where vector instructions like it


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


class Streamed(nn.Module):
    """Experts whose weights are not held, for evaluation alone.

    Args:
        stored: their parameters in the file, by name.
        rows: which of their rows are the experts of this layer.
        stream: of the model.

    Attributes:
        passes: what of an expert is read at once: names of its parameters, pass by pass.

    Raises:
        RuntimeError: in training, or where a gradient is asked for.
        CheckpointError: the file changed or is gone.
    """

    passes: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, stored: Mapping[str, StoredTensor], rows: Sequence[int], stream: ExpertStream):
        super().__init__()
        self.stored, self.rows, self.stream = dict(stored), list(rows), stream

    @classmethod
    def slot_bytes(cls, stored: Mapping[str, StoredTensor]) -> int:
        """What a slot for one expert takes."""
        return max(stop for names in cls.passes for _, stop in places(stored, names).values())

    def check(self) -> None:
        """Raises CheckpointError for an expert with a value that is not finite; reads all of them, one at a time."""
        host = torch.empty(self.stream.expert_bytes, dtype=torch.uint8, device="cpu")
        for names in self.passes:
            for expert in range(len(self.rows)):
                self._read(names, expert, host)
                for name, tensor in self._tensors(names, host, None).items():
                    if not tensor.isfinite().all():
                        stored = self.stored[name]
                        raise CheckpointError(
                            f"expected finite weights, found NaN or infinite values in {stored.name} of {stored.path}"
                        )

    def _refuse_training(self, *inputs: Tensor) -> None:
        if self.training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            raise RuntimeError(
                "expected evaluation without gradients, found training: offloaded experts cannot be trained; load the "
                "model without offload_experts"
            )

    def _pass(
        self,
        names: Sequence[str],
        indices_NK: Tensor,
        dtype: torch.dtype,
        compute: Callable[[dict[str, Tensor], Tensor, Tensor], None],
    ) -> None:
        """Calls `compute` for each expert that has tokens: with its tensors `names`, its tokens, and the number `k` by
        which each of them chose it. The tensors are gone afterwards."""
        queue = torch.bincount(indices_NK.flatten(), minlength=len(self.rows)).nonzero().flatten().tolist()
        with self.stream.turn(indices_NK.device):
            reading = self._fetch(names, 0, queue[0])
            for i, expert in enumerate(queue):
                slot = reading.result()
                try:
                    if i + 1 < len(queue):
                        reading = self._fetch(names, i + 1, queue[i + 1])
                    tensors = self._tensors(names, self.stream.ready(slot), dtype)
                    compute(tensors, *(indices_NK == expert).nonzero(as_tuple=True))
                    self.stream.done(slot)
                except BaseException:
                    with contextlib.suppress(Exception):
                        reading.result()  # nobody else may have the slots while they are written to
                    raise

    def _fetch(self, names: Sequence[str], number: int, expert: int) -> "Future[Slot]":
        return self.stream.fetch(number, lambda host: self._read(names, expert, host))

    def _read(self, names: Sequence[str], expert: int, host: Tensor) -> None:
        for name, (start, stop) in places(self.stored, names).items():
            self.stored[name].read_row(self.rows[expert], host[start:stop])

    def _tensors(self, names: Sequence[str], held: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The expert that a slot holds."""
        found = {}
        for name, (start, stop) in places(self.stored, names).items():
            stored = self.stored[name]
            found[name] = held[start:stop].view(stored.dtype).view(stored.shape[1:]).to(dtype or stored.dtype)
        return found

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={list(stored.shape[1:])}" for name, stored in self.stored.items())
        return f"experts={len(self.rows)}, {sizes}, file={next(iter(self.stored.values())).path.name}"


class StreamedExperts(Streamed):
    """What `SparseExperts` computes, `FFN_e(x) = W2_e gelu(W1_e x + b1_e) + b2_e`, from weights that are not held.

    Equal to `SparseExperts` with backend `torch` within rounding: the last bit of a product may depend on where in
    memory its operands begin. Arguments and errors as of `Streamed`.
    """

    passes = (("w_up", "b_up", "w_down", "b_down"),)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through its experts, and their weighted sum: `[N, D]`."""
        self._refuse_training(x_ND, weights_NK)
        out_NO = x_ND.new_zeros(len(x_ND), self.stored["w_down"].shape[1])

        def compute(w: dict[str, Tensor], tokens: Tensor, k: Tensor) -> None:
            y = F.linear(F.gelu(F.linear(x_ND[tokens], w["w_up"], w["b_up"])), w["w_down"], w["b_down"])
            out_NO.index_add_(0, tokens, (y * weights_NK[tokens, k].unsqueeze(-1)).to(out_NO.dtype))

        self._pass(self.passes[0], indices_NK, x_ND.dtype, compute)
        return out_NO


class StreamedHeads(Streamed):
    """What `HeadExperts` computes, from weights that are not held: the queries of all heads, one head after the other,
    then attention, then their outputs.

    Equal to `HeadExperts` with backend `torch` within rounding; arguments and errors as of `Streamed`.
    """

    passes = (("w_query",), ("w_out",))

    def forward(self, x_ND: Tensor, key: Tensor, value: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through the heads that it chose, and their weighted sum: `[N, D]`; see `HeadExperts`."""
        self._refuse_training(x_ND, key, value, weights_NK)
        query_NKH = x_ND.new_zeros(*indices_NK.shape, self.stored["w_query"].shape[1])
        out_NKD = x_ND.new_zeros(*indices_NK.shape, self.stored["w_out"].shape[1])

        def queries(w: dict[str, Tensor], tokens: Tensor, k: Tensor) -> None:
            query_NKH[tokens, k] = F.linear(x_ND[tokens], w["w_query"]).to(query_NKH.dtype)

        def outputs(w: dict[str, Tensor], tokens: Tensor, k: Tensor) -> None:
            out_NKD[tokens, k] = F.linear(weighted_NKH[tokens, k], w["w_out"]).to(out_NKD.dtype)

        self._pass(self.passes[0], indices_NK, x_ND.dtype, queries)
        mixed_NKH = attend(query_NKH, key, value)
        weighted_NKH = (mixed_NKH * weights_NK.unsqueeze(-1)).to(mixed_NKH.dtype)
        self._pass(self.passes[1], indices_NK, x_ND.dtype, outputs)
        return out_NKD.sum(1)


class StoredHead(nn.Module):
    """The head of a task, for evaluation alone: read when it is called and let go of when it has answered.

    Args:
        head: what it computes, on the meta device.
        stored: its parameters and buffers in the file, by name.

    Raises:
        CheckpointError: the file changed or is gone.
    """

    def __init__(self, head: nn.Module, stored: Mapping[str, StoredTensor]):
        super().__init__()
        self._bare = [head.eval().requires_grad_(False)]  # in a list: no submodule, which would be moved to devices
        self.stored = dict(stored)

    def forward(self, x: Tensor) -> Tensor:
        """As of the head."""
        head = copy.deepcopy(self._bare[0])  # of its own, as other threads may call it too
        state = {}
        for name, stored in self.stored.items():
            state[name] = stored.read().to(x.device, x.dtype if stored.dtype.is_floating_point else None)
        head.load_state_dict(state, assign=True)
        return head(x)

    def extra_repr(self) -> str:
        return f"file={next(iter(self.stored.values())).path.name}"


def places(stored: Mapping[str, StoredTensor], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Where each tensor of one expert is in a slot: its first byte, and the one after its last."""
    found, start = {}, 0
    for name in names:
        found[name] = start, start + stored[name].row_bytes
        start += -(-stored[name].row_bytes // ALIGNMENT) * ALIGNMENT
    return found
