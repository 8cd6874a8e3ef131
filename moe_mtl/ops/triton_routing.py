"""The routing plan in three kernels: count, scan, scatter. No sort, no atomics, no look at the data from the host.

Shapes: `S` routed copies, `E` experts. A block is `BLOCK` copies; `BINS` is the power of two that holds `E + 1` ids.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

BLOCK = 1024  # copies that one program counts and scatters


@triton.jit
def _expert_ids(ids_ptr, copies, num_copies, num_experts):
    """Expert of each copy. What is no id counts as nobody's: a kernel cannot raise, but must not write astray."""
    ids = tl.load(ids_ptr + copies, mask=copies < num_copies, other=0).to(tl.int32)
    return tl.where((ids < 0) | (ids > num_experts), num_experts, ids)


@triton.jit
def count_kernel(ids_ptr, counts_ptr, num_copies, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    copies = block * BLOCK + tl.arange(0, BLOCK)
    ids = _expert_ids(ids_ptr, copies, num_copies, num_experts)
    counts = tl.histogram(ids, BINS, mask=copies < num_copies)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def scan_kernel(counts_ptr, offsets_ptr, num_blocks, num_experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Counts of a block become counts of all blocks before it; the totals become the experts' offsets."""
    bins = tl.arange(0, BINS)
    totals = tl.zeros([BINS], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        blocks = first + tl.arange(0, CHUNK)
        at = counts_ptr + blocks[:, None] * BINS + bins[None, :]
        counts = tl.load(at, mask=blocks[:, None] < num_blocks, other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + totals[None, :], mask=blocks[:, None] < num_blocks)
        totals += tl.sum(counts, 0)
    starts = tl.cumsum(totals, 0) - totals
    tl.store(offsets_ptr + bins, starts.to(tl.int64), mask=bins <= num_experts)


@triton.jit
def scatter_kernel(
    ids_ptr,
    before_ptr,
    offsets_ptr,
    order_ptr,
    position_ptr,
    num_copies,
    num_experts,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    next_place = tl.load(offsets_ptr + bins, mask=bins <= num_experts, other=0)
    next_place += tl.load(before_ptr + block * BINS + bins).to(tl.int64)
    for first in range(0, BLOCK, PART):
        copies = block * BLOCK + first + tl.arange(0, PART)
        here = copies < num_copies
        ids = _expert_ids(ids_ptr, copies, num_copies, num_experts)
        chosen = ((ids[:, None] == bins[None, :]) & here[:, None]).to(tl.int32)
        rank = tl.cumsum(chosen, 0) - 1  # stable: earlier copies of the same expert stand first
        place = tl.sum(chosen * (next_place[None, :] + rank), 1)
        next_place += tl.sum(chosen, 0)
        tl.store(order_ptr + place, copies, mask=here)
        tl.store(position_ptr + copies, place, mask=here)


@triton.jit
def tiles_kernel(
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    num_experts,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
):
    bins = tl.arange(0, BINS)
    starts = tl.load(offsets_ptr + bins, mask=bins < num_experts, other=0)
    ends = tl.load(offsets_ptr + bins + 1, mask=bins < num_experts, other=0)
    tiles_of = (ends - starts + ROWS - 1) // ROWS
    first_of = tl.cumsum(tiles_of, 0) - tiles_of
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    nth = tiles[:, None] - first_of[None, :]
    inside = (nth >= 0) & (nth < tiles_of[None, :])
    used = tl.sum(inside.to(tl.int32), 1) > 0
    expert = tl.where(used, tl.sum(tl.where(inside, bins[None, :], 0), 1), num_experts)
    start = tl.sum(tl.where(inside, starts[None, :] + nth * ROWS, 0), 1)
    tl.store(tile_expert_ptr + tiles, expert.to(tl.int32), mask=tiles < num_tiles)
    tl.store(tile_start_ptr + tiles, start, mask=tiles < num_tiles)


def plan(ids_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, position and offsets of a `RoutingPlan`."""
    num_copies, bins = len(ids_S), triton.next_power_of_2(num_experts + 1)
    bins = max(bins, 16)
    num_blocks = triton.cdiv(num_copies, BLOCK)
    counts = torch.empty(max(num_blocks, 1), bins, dtype=torch.int32, device=ids_S.device)
    order_S = torch.empty(num_copies, dtype=torch.int64, device=ids_S.device)
    position_S, offsets = torch.empty_like(order_S), order_S.new_empty(num_experts + 1)
    sizes = {"num_copies": num_copies, "num_experts": num_experts, "BINS": bins}
    if num_blocks:
        launch(count_kernel, (num_blocks,), {"ids_ptr": ids_S, "counts_ptr": counts, **sizes, "BLOCK": BLOCK})
    launch(
        scan_kernel,
        (1,),
        {
            "counts_ptr": counts,
            "offsets_ptr": offsets,
            "num_blocks": num_blocks,
            "num_experts": num_experts,
            "CHUNK": max(1, 8192 // bins),
            "BINS": bins,
        },
        num_warps=8,
    )
    if num_blocks:
        launch(
            scatter_kernel,
            (num_blocks,),
            {
                "ids_ptr": ids_S,
                "before_ptr": counts,
                "offsets_ptr": offsets,
                "order_ptr": order_S,
                "position_ptr": position_S,
                **sizes,
                "BLOCK": BLOCK,
                "PART": min(BLOCK, max(1, 8192 // bins)),
            },
            num_warps=8,
        )
    return order_S, position_S, offsets


def tiles(offsets: Tensor, num_copies: int, rows: int) -> tuple[Tensor, Tensor]:
    """Expert and first place of each tile; see `RoutingPlan.tiles`."""
    num_experts = len(offsets) - 1
    num_tiles = num_copies // rows + min(num_experts, num_copies)
    expert_T = torch.empty(num_tiles, dtype=torch.int32, device=offsets.device)
    start_T = offsets.new_empty(num_tiles)
    bins = max(16, triton.next_power_of_2(num_experts))
    per_program = max(16, 4096 // bins)
    if num_tiles:
        launch(
            tiles_kernel,
            (triton.cdiv(num_tiles, per_program),),
            {
                "offsets_ptr": offsets,
                "tile_expert_ptr": expert_T,
                "tile_start_ptr": start_T,
                "num_tiles": num_tiles,
                "num_experts": num_experts,
                "ROWS": rows,
                "TILES": per_program,
                "BINS": bins,
            },
        )
    return expert_T, start_T
