"""Which tiles the expert kernels should take on this GPU: measured, and written into their table.

One kernel after the other: its candidates in turns, all else as it stands, the time of a whole forward and backward.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from ..ops.triton_configs import Config, Kernel, forced, remember
from .timing import alternate

# cols, depth, warps, stages
TILES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "first_layer": ((32, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3), (64, 64, 8, 4), (128, 64, 8, 3)),
    "linear": ((64, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)),
    "hidden_grad": ((32, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4)),
    "outer": ((64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)),
}
GROUPS = (4, 8, 16)


def candidates(kernel: str, rows: int) -> list[Config]:
    """Tiles to try: `rows` high, but for `outer`, whose rows are those of a weight."""
    height = 128 if kernel == "outer" else rows
    return [Config(height, *tile, group) for tile, group in itertools.product(TILES[kernel], GROUPS)]


def tune(options: Any, progress: Callable[[str], None]) -> None:
    """Measures every shape and half-precision dtype of a run of `bench kernels`, and extends the table."""
    from .kernels import OURS, contenders
    from .kernels import Options as KernelOptions

    only_ours = KernelOptions(device="cuda", balanced=options.balanced, seed=options.seed)
    for dtype, shape in itertools.product(options.dtypes, options.grid):
        if dtype == "float32":  # no tensor cores to feed
            continue
        call = contenders(getattr(torch, dtype), shape, "full", only_ours)[OURS]
        found = best_tiles(call, shape, options.rounds, torch.cuda.synchronize)
        remember(torch.cuda.get_device_name(), found)
        progress(f"{dtype} {shape}: {found}")


def best_tiles(
    call: Callable[[], object], shape: Sequence[int], rounds: int, wait: Callable[[], object]
) -> dict[str, dict[str, Config]]:
    """Shape class -> kernel -> the candidate with the shortest median; what does not fit the device is passed over."""
    from triton.runtime.errors import OutOfResources

    from ..ops.triton_configs import rows_per_tile

    experts, tokens, _, _, chosen = shape
    rows = rows_per_tile(tokens * chosen, experts)
    found: dict[str, dict[str, Config]] = {}
    for kernel in get_args(Kernel):
        classes: set[str] = set()
        calls = {}
        for config in candidates(kernel, rows):

            def forced_call(kernel: Kernel = kernel, config: Config = config, classes: set[str] = classes) -> None:
                with forced(kernel, config) as asked:
                    call()
                classes.update(asked)

            try:
                forced_call()
            except OutOfResources:
                continue
            calls[str(config)] = forced_call
        timings = alternate(calls, rounds, 0.0, wait)
        best = min(timings, key=lambda name: timings[name].median)
        config = next(c for c in candidates(kernel, rows) if str(c) == best)
        for name in classes:
            found.setdefault(name, {})[kernel] = config
    return found
