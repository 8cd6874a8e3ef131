"""Peak memory of one contender, in a process of its own: `python -m moe_mtl.bench.memory JSON`."""

import dataclasses
import json
import resource
import subprocess
import sys
from typing import Any

from .work import Shape


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
