"""Peak memory: of one call in this process, or of one contender in its own, `python -m moe_mtl.bench.memory JSON`."""

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from .work import Shape

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 2**16
# What glibc reads when a process starts; other systems leave it unread.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(LARGE), "MALLOC_TRIM_THRESHOLD_": str(LARGE), "MALLOC_TOP_PAD_": "0"}


@contextlib.contextmanager
def process_that_gives_back() -> Iterator[ProcessPoolExecutor]:
    """A process for `peak_of_call` that leaves no holes in the heap from its first byte on, so none of what it imports
    either, in which a call would find room unseen."""
    with mock.patch.dict(os.environ, _GIVES_BACK), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


def give_back_what_is_freed() -> None:
    """From here on in this process, on Linux: no holes in the heap, which differ from process to process.

    What is large and was made before stays where it is: best called first of all.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def peak_of_call(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes that a call holds at its peak beyond what is held before it, after one call to warm up.

    On a CPU from the kernel's high-water mark of the process, so only on Linux; None elsewhere. There whatever is freed
    goes back to the system from then on, so that holes in the heap are not counted. What is timed later would be slow:
    best called in a process that times nothing.
    """
    import torch

    if device == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    give_back_what_is_freed()
    call()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, else the call would take it unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_memory(contender: str, shape: Shape, rows: int, batch_size: int, seed: int, threads: int) -> dict[str, int]:
    """Bytes that a process needs to train one epoch.

    Args:
        contender: its name.
        shape: of the model; its categories are those of the generated rows.
        rows: generated rows to train on.
        batch_size: rows per step.
        seed: of the rows.
        threads: of torch.

    Returns:
        `peak`: the most the process ever held; `above_imports`: how much came after rows and libraries were loaded.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    request = {
        "contender": contender,
        "shape": dataclasses.asdict(shape),
        "rows": rows,
        "batch_size": batch_size,
        "seed": seed,
        "threads": threads,
    }
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {contender} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _held() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure(request: dict[str, Any]) -> dict[str, int]:
    import torch

    from .contenders import contenders
    from .rows import generated_rows

    torch.set_num_threads(request["threads"])
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in request["shape"].items()}
    shape = Shape(**fields)
    chosen = next(c for c in contenders(compiled=True)[0] if c.name == request["contender"])
    rows, _ = generated_rows(request["rows"], request["seed"])
    model = chosen.build(shape)
    # One step imports what the library imports late.
    chosen.epoch(model, shape, {name: values[:64] for name, values in rows.items()}, 64)()
    before = _held()
    chosen.epoch(model, shape, rows, request["batch_size"])()
    peak = _held()
    return {"peak": peak, "above_imports": peak - before}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
