"""Tile sizes of the expert kernels: a heuristic, and a table of what was measured to be better.

The table is `triton_table.json` beside this file: `device name -> shape class -> kernel -> Config`. `moe-mtl bench
kernels --tune` measures candidates and writes it. Where it says nothing the heuristic holds: no kernel is ever tuned
while a model runs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ..files import write_atomically

TABLE = Path(__file__).with_name("triton_table.json")
Kernel = Literal["first_layer", "linear", "hidden_grad", "outer"]


@dataclass(frozen=True)
class Config:
    """Tile of one program.

    Attributes:
        rows: places per tile, a power of two from 16; of `outer` the rows of the result.
        cols: columns of the result.
        depth: how much of the summed dimension one step takes.
        num_warps, num_stages: as Triton means them.
        group: row tiles walked before the next column tile.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8


_forced: dict[str, tuple[Config, set[str]]] = {}


def rows_per_tile(num_copies: int, num_experts: int) -> int:
    """The power of two next above the copies of an average expert, from 16 to 128."""
    average = max(1, num_copies // max(num_experts, 1))
    return min(128, max(16, 1 << (average - 1).bit_length()))


def shape_class(dtype: torch.dtype, rows: int, width: int, depth: int) -> str:
    """What kernels of like speed share: bytes of an element, rows of a tile, narrow or wide on both sides."""
    size = {torch.float32: "32", torch.bfloat16: "16", torch.float16: "16"}[dtype]
    return f"{size} bit, {rows} rows, {'wide' if width >= 256 else 'narrow'}, {'deep' if depth >= 1024 else 'shallow'}"


def config_for(
    kernel: Kernel, dtype: torch.dtype, rows: int, width: int, depth: int, device: torch.device, gated: bool = False
) -> Config:
    """The table's entry for this device and shape class, else the heuristic's.

    Args:
        rows: of a tile, as `rows_per_tile` says; ignored by `outer`, whose rows are those of the result.
        width, depth: columns of the result, and the length of the sum (of `outer`: the result's rows).
        gated: `first_layer` computes two products at once.
    """
    if kernel in _forced:
        config, asked = _forced[kernel]
        asked.add(shape_class(dtype, rows, width, depth))
        return config
    if device.type == "cuda":
        measured = _table().get(torch.cuda.get_device_name(device), {})
        found = measured.get(shape_class(dtype, rows, width, depth), {}).get(kernel)
        if found is not None:
            return Config(**found)
    return heuristic(kernel, dtype, rows, width, depth, gated)


@contextmanager
def forced(kernel: Kernel, config: Config) -> Iterator[set[str]]:
    """Within the block `kernel` takes `config`; yields the shape classes that asked for it. For measurements."""
    asked: set[str] = set()
    _forced[kernel] = (config, asked)
    try:
        yield asked
    finally:
        del _forced[kernel]


def remember(device_name: str, found: Mapping[str, Mapping[str, Config]]) -> None:
    """Adds to the table: shape class -> kernel -> what to take on that device."""
    table = {name: dict(classes) for name, classes in _table().items()}
    device = table.setdefault(device_name, {})
    for shape, kernels in found.items():
        device[shape] = device.get(shape, {}) | {kernel: asdict(config) for kernel, config in kernels.items()}
    write_atomically(TABLE, json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


def heuristic(kernel: Kernel, dtype: torch.dtype, rows: int, width: int, depth: int, gated: bool = False) -> Config:
    """Tiles as large as the registers of sm_80 to sm_100 hold without spilling; `moe-mtl bench compiled` shows it."""
    if width % 8 or depth % 8:  # rows that start off 16 bytes are read element by element
        if kernel == "outer":
            return Config(64, 32, 16, 8, 2)
        return Config(rows, 16 if dtype == torch.float32 or kernel == "hidden_grad" else 32, 16, 8, 2)
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles
        return Config(64 if kernel == "outer" else rows, 32 if gated else 64, 32, 4 if kernel == "linear" else 8, 2)
    if kernel == "outer":
        return Config(128, 128 if width > 64 else 64, 64, 8, 3)
    cols = min(128 if rows >= 64 else 64, max(32, 1 << (width - 1).bit_length()))
    if gated:
        cols = min(cols, 64)
    few = kernel == "linear" and rows == 16
    return Config(rows, cols, 64, 2 if few else 8 if rows * cols > 64 * 64 else 4, 3)


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}
