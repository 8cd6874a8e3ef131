"""Where the rows of each expert lie, and the products of experts with their rows.

Experts are taken a few neighbours at a time, a *part*, so that what lies between two layers stays in the caches of a
CPU and never exists for all copies at once. In a part rows lie in one of two ways. One expert after the other, each
product by itself; or in *slots*, as many for every expert as the busiest of the part needs: then they are one batched
product, which two threads of a CPU share better than many small ones.

Shapes: `N` tokens, `D` width, `E` experts (of a part: its own), `K` experts chosen per token, `S = N K` routed copies,
`C` of a part, `R` rows (of a part: its own), `P` and `O` widths of a product.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import RoutingPlan

# What is between the layers has at most about as many bytes in a part.
BYTES = 2**21
# Where few experts are to be left for the last part: two, which two threads share, of as many.
EXPERTS_PER_TWO_LAST = 16
# Slots may be this many times the copies; or, where at least half of the experts have a copy, this many per expert:
# then a product takes as long as it takes to read the weights.
SLOTS_PER_COPY = 2
FREE_SLOTS = 16
# With more rows than this an expert's product is fast by itself, and slots may only be a few more than the copies.
MANY_ROWS = 128
SLOTS_PER_COPY_OF_MANY = 1.1


@cache
def batches_turned(dtype: torch.dtype) -> bool:
    """Whether a CPU's batched product is fast with turned matrices too, as the forward's are.

    In single precision it was slower than one product after the other with AVX-512, and faster with AVX2.
    """
    return dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX2"


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether the CPU computes products of half precision in software: then every row counts, empty ones too."""
    return dtype in (torch.float16, torch.bfloat16) and "AVX512" not in torch.backends.cpu.get_cpu_capability()


@dataclass
class Part:
    """Neighbouring experts and their rows.

    Attributes:
        experts, rows: which of all.
        copies: which of all in the plan's order.
        ends_E: where the copies of each expert end, counted from the part's first: int32.
        num_selected: `K`.
        slots: rows of each expert where all have as many, else None.
        copies_R: the copy that stands in each row; any in empty ones.
        real_C: of each copy the number of its row, None where every row has a copy.
        grouped: whether torch's grouped products compute it, where they can.
    """

    experts: slice
    rows: slice
    copies: slice
    ends_E: Tensor
    num_selected: int
    slots: int | None
    copies_R: Tensor
    real_C: Tensor | None
    grouped: bool = False

    def of_copies(self, x_SD: Tensor) -> Tensor:
        """Of each row what belongs to its copy. Empty rows hold 0: what is infinite elsewhere would become NaN here."""
        return self._emptied(x_SD.index_select(0, self.copies_R))

    def of_tokens(self, x_ND: Tensor) -> Tensor:
        """Of each row what belongs to its token."""
        return self._emptied(x_ND.index_select(0, self.tokens_R))

    def product(self, x_RD: Tensor, w_EDP: Tensor, out_RP: Tensor) -> Tensor:
        """Each expert's rows times its matrix, written to `out_RP`."""
        if self.slots is not None and (batches_turned(x_RD.dtype) or w_EDP.stride(2) == 1):
            torch.bmm(self._by_expert(x_RD), w_EDP, out=self._by_expert(out_RP))
        elif self.grouped and _torch_takes(x_RD, w_EDP):
            out_RP.copy_(F.grouped_mm(x_RD, w_EDP, offs=self.ends_E))
        else:
            for x, w_DP, out in zip(self._each(x_RD), w_EDP.unbind(), self._each(out_RP), strict=True):
                if len(x):
                    torch.mm(x, w_DP, out=out)
            self._emptied(out_RP)
        return out_RP

    def outer(self, a_RP: Tensor, b_RD: Tensor, out_EPD: Tensor) -> None:
        """Per expert the product of its rows, written to `out_EPD`; 0 for an expert without rows."""
        if self.slots is not None:
            torch.bmm(self._by_expert(a_RP).transpose(1, 2), self._by_expert(b_RD), out=out_EPD)
        elif self.grouped and _torch_takes(a_RP, b_RD):
            out_EPD.copy_(F.grouped_mm(a_RP.t(), b_RD, offs=self.ends_E))
        else:
            for a, b, out_PD in zip(self._each(a_RP), self._each(b_RD), out_EPD.unbind(), strict=True):
                torch.mm(a.t(), b, out=out_PD)

    def of_experts(self, b_EP: Tensor) -> Tensor:
        """Of each row what belongs to its expert: `[R, P]`."""
        return b_EP[self.experts].index_select(0, self.experts_R)

    def sums(self, rows_RP: Tensor, out_EP: Tensor) -> None:
        """Per expert the sum of its rows, written to `out_EP`."""
        if self.slots is not None:
            torch.sum(self._by_expert(rows_RP), 1, out=out_EP)
        else:
            for out_P, rows in zip(out_EP.unbind(), self._each(rows_RP), strict=True):
                torch.sum(rows, 0, out=out_P)

    @cached_property
    def _empty_R(self) -> Tensor:
        """Numbers of the rows that no copy stands in."""
        assert self.real_C is not None
        real_R = torch.zeros(len(self.copies_R), dtype=torch.bool, device="cpu").index_fill_(0, self.real_C, True)
        return real_R.logical_not_().nonzero().flatten()

    @cached_property
    def tokens_R(self) -> Tensor:
        return self.copies_R // self.num_selected

    @cached_property
    def experts_R(self) -> Tensor:
        """Of each row its expert, counted from the part's first."""
        if self.slots is None:
            return torch.repeat_interleave(self._counts_E)
        return torch.arange(len(self.ends_E), device=self.copies_R.device).repeat_interleave(self.slots)

    @property
    def _counts_E(self) -> Tensor:
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))

    @cached_property
    def _sizes(self) -> list[int]:
        """Rows of each expert; with slots, its empty rows after them. The host waits for the device to know them."""
        counts = self._counts_E.tolist()
        return counts if self.slots is None else [n for count in counts for n in (count, self.slots - count)]

    def _each(self, rows_RP: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, without empty ones."""
        return rows_RP.split(self._sizes)[:: 1 if self.slots is None else 2]

    def _by_expert(self, rows_RP: Tensor) -> Tensor:
        return rows_RP.view(len(self.ends_E), -1, rows_RP.shape[1])

    def _emptied(self, rows_RP: Tensor) -> Tensor:
        return rows_RP if self.real_C is None else rows_RP.index_fill_(0, self._empty_R, 0)


@dataclass
class Layout:
    """Rows of all experts.

    Attributes:
        parts: in the order of the experts.
        position_NK: the row of each copy; those of copies for nobody come last.
        num_rows: with theirs.
        num_placed: without.
    """

    parts: list[Part]
    position_NK: Tensor
    num_rows: int
    num_placed: int

    def empty(self, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`[R, P]` to write to, by default of the dtype of `like`; the rows of nobody hold 0."""
        rows_RP = like.new_empty(self.num_rows, width, dtype=dtype)
        rows_RP[self.num_placed :] = 0
        return rows_RP


def lay_out(plan: RoutingPlan, width: int, dtype: torch.dtype, slots: bool = True, few_last: bool = False) -> Layout:
    """Chooses the parts, and for each slots or none.

    Args:
        plan: what is to be laid out.
        width, dtype: of a row between the layers, where it is widest.
        slots: False for rows in the plan's order. So they are on a GPU, in one part.
        few_last: few experts are left for the last part. For a backward, which holds the most in the end, when the
            gradients of all experts are there: then little else should be.
    """
    key = width * dtype.itemsize, slots and not is_emulated(dtype), few_last
    if key not in plan.layouts:
        on_cpu = plan.order_S.device.type == "cpu"
        plan.layouts[key] = _in_parts(plan, *key) if on_cpu else in_one_part(plan)
    return plan.layouts[key]


def _in_parts(plan: RoutingPlan, row_bytes: int, slots: bool, few_last: bool) -> Layout:
    ends = plan.offsets.tolist()
    counts = [end - start for start, end in pairwise(ends)]
    most = max(1, BYTES // max(1, row_bytes))
    last = len(counts) - (2 * (len(counts) // EXPERTS_PER_TWO_LAST) if few_last else 0)
    chosen = _choose(counts, 0, last, most, slots) + _choose(counts, last, len(counts), most, slots)
    rows_of_E = [n if slots is None else slots for first, stop, slots in chosen for n in counts[first:stop]]
    starts = [*accumulate(rows_of_E, initial=0)]
    nobodys = len(plan.order_S) - plan.num_placed
    copies_R, position_S, real_S = plan.order_S, plan.position_S, None
    if starts[-1] > plan.num_placed:
        # How far the rows of each expert lie behind its copies in the plan's order.
        behind_E1 = torch.tensor([start - end for start, end in zip(starts, ends, strict=True)], device="cpu")
        position_S = plan.position_S + behind_E1.index_select(0, plan.indices_NK.flatten())
        copies_R = copies_R.new_zeros(starts[-1] + nobodys)
        copies_R.scatter_(0, position_S, torch.arange(len(position_S), device="cpu"))
        real_S = position_S.index_select(0, plan.order_S)
    parts = []
    for first, stop, slots_each in chosen:
        rows, copies = slice(starts[first], starts[stop]), slice(ends[first], ends[stop])
        ends_E = torch.tensor(
            [end - copies.start for end in ends[first + 1 : stop + 1]], dtype=torch.int32, device="cpu"
        )
        real_C = None
        if real_S is not None and rows.stop - rows.start > copies.stop - copies.start:
            real_C = real_S[copies] - rows.start
        which = slice(first, stop), rows, copies
        parts.append(Part(*which, ends_E, plan.num_selected, slots_each, copies_R[rows], real_C))
    return Layout(parts, position_S.view_as(plan.indices_NK), starts[-1] + nobodys, starts[-1])


def in_one_part(plan: RoutingPlan) -> Layout:
    """All experts together, for products that are one launch each."""
    experts, rows = slice(0, plan.num_experts), slice(0, plan.num_placed)
    part = Part(experts, rows, rows, plan.ends_E, plan.num_selected, None, plan.order_S[rows], None, grouped=True)
    return Layout([part], plan.position_S.view_as(plan.indices_NK), len(plan.order_S), plan.num_placed)


def _choose(counts: list[int], first: int, stop: int, most: int, with_slots: bool) -> list[tuple[int, int, int | None]]:
    """Of each part its first expert, the one after its last, and its slots; slots for `most` rows, or one expert."""
    chosen, busiest = [], 0
    for expert, count in enumerate([*counts[first:stop], 0], start=first):
        end = expert == stop
        if expert > first and (end or (expert + 1 - first) * max(busiest, count) > most):
            slots = busiest if with_slots and _worth(counts[first:expert]) else None
            chosen.append((first, expert, slots))
            first, busiest = expert, 0
        busiest = max(busiest, count)
    return chosen


def _worth(counts: list[int]) -> bool:
    """Whether slots for the busiest of these experts cost no more than they bring."""
    busiest, copies = max(counts), sum(counts)
    if len(counts) == 1 or not copies:
        return False
    most = SLOTS_PER_COPY if busiest <= MANY_ROWS else SLOTS_PER_COPY_OF_MANY
    if len(counts) * busiest <= most * copies:
        return True
    return busiest <= FREE_SLOTS and 2 * sum(n > 0 for n in counts) >= len(counts)


def _torch_takes(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes them: not float64, dense one way, a multiple of 16 bytes the other."""
    for t in operands:
        strides = list(t.stride())
        if t.dtype == torch.float64 or t.data_ptr() % 16 or 1 not in strides[-2:]:
            return False
        strides.remove(1)
        if any(stride * t.itemsize % 16 for stride in strides):
            return False
    return True
