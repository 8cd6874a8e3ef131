"""`moe-mtl bench tabular`: training and answering beside torch-rechub and deepctr-torch.

One run, the same tensors and shapes for all, in turns; ratios are medians over rounds measured side by side. Latency is
that of the model folded for inference, and beside it of the model as it loads. With each figure stands its floor: the
time of the bare matrix products in the faster of two forms, three times over for training.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .contenders import Contender, Ours, Rows, contenders
from .memory import peak_memory
from .report import plot, table, to_stderr, write
from .rows import CATEGORIES, NUM_NUMERIC, NUM_ROWS, census_rows, first, generated_rows
from .timing import Timing, alternate, torch_threads
from .work import Shape, floor_calls

PARTS = ("latency", "training", "memory")
MODELS = {"mmoe": 0, "ple-1": 1, "ple-2": 2}
SLICE_SECONDS = 0.05


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        parts: of latency, training, memory.
        models: of mmoe, ple-1, ple-2 (PLE with one and two levels).
        tasks: numbers of tasks, for latency.
        batches: rows per call, for latency.
        training_batches: rows per step, for training; memory takes the largest.
        data: the UCI file of Census-Income; by default rows are generated with its columns.
        rows: at most that many rows to train on.
        rounds: measurements of each contender's latency.
        training_rounds: epochs of each contender.
        threads: of torch; its own choice by default.
        compile: also measure ours through torch.compile.
        seed: of weights and generated rows.
        output: folder for tabular.json, and tabular.svg where matplotlib is installed.
    """

    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = tuple(MODELS)
    tasks: tuple[int, ...] = (2, 8)
    batches: tuple[int, ...] = (1, 64, 4096)
    training_batches: tuple[int, ...] = (1024, 4096)
    data: str | None = None
    rows: int | None = None
    rounds: int = 21
    training_rounds: int = 5
    threads: int | None = None
    compile: bool = False
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("models", tuple(MODELS))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        for name, lowest in (("tasks", 2), ("batches", 1), ("training_batches", 2)):
            for value in getattr(self, name):
                if value < lowest:
                    raise ValueError(f"{name}: expected at least {lowest}, found {value}")
        for name in ("rows", "rounds", "training_rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures, and writes the files that were asked for.

    Args:
        options: what to measure.
        progress: told each step as one line.

    Returns:
        the result as JSON types: `versions`, `machine`, `options`, and one list of rows per part; times in seconds.

    Raises:
        ValueError, DataError, FileNotFoundError: data that cannot be read.
    """
    with torch_threads(options.threads):
        found, versions = contenders(options.compile)
        result: dict[str, Any] = {
            "bench": "tabular",
            "versions": versions,
            "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "python": platform.python_version()},
            "options": asdict(options)
            | {key: list(value) for key, value in asdict(options).items() if isinstance(value, tuple)},
        }
        for part, measure in (("latency", _latency), ("training", _training), ("memory", _memory)):
            if part in options.parts:
                result[part] = measure(options, found, progress)
    write(result, options.output, plot(result))
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the tables on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def _latency(options: Options, found: Sequence[Contender], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    measured = []
    found = [Ours(folded=True), *found]
    for num_tasks in options.tasks:
        for name in options.models:
            # About eight experts in each level, whatever the number of tasks.
            specific, shared = (3, 2) if num_tasks == 2 else (1, 1)
            shape = Shape(
                MODELS[name],
                num_tasks,
                num_numeric=128,
                num_specific=specific,
                num_shared=shared,
                expert_dims=(256, 128),
            )
            models = _build(found, shape, options.seed)
            for batch in options.batches:
                draw = torch.Generator().manual_seed(options.seed)
                rows = {"numeric": torch.randn(batch, shape.num_numeric, generator=draw)}
                calls = {c.name: c.forward(models[c.name], shape, rows) for c in found}
                floors = floor_calls(shape, batch)
                timings = alternate(calls | _floor_names(floors), options.rounds, SLICE_SECONDS)
                measured.append(_row(shape, batch, models, timings))
                progress(f"latency of {name}, {num_tasks} tasks, batch {batch}: done")
    return measured


def _training(options: Options, found: Sequence[Contender], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    rows, categories = _rows(options)
    num_rows = len(rows["labels"])
    measured = []
    for name in options.models:
        shape = Shape(MODELS[name], rows["labels"].shape[1], rows["numeric"].shape[1], categories)
        for batch in options.training_batches:
            models = _build(found, shape, options.seed)
            calls = {c.name: c.epoch(models[c.name], shape, rows, batch) for c in found}
            steps = num_rows / min(batch, num_rows)
            floors = {
                form: _repeat(call, round(3 * steps)) for form, call in floor_calls(shape, min(batch, num_rows)).items()
            }
            timings = alternate(calls | _floor_names(floors), options.training_rounds)
            row = _row(shape, batch, models, timings) | {"rows": num_rows}
            for figure in row["results"].values():
                figure["rows_per_second"] = num_rows / figure["median"]
            row["floor_rows_per_second"] = num_rows / row["floor"]
            measured.append(row)
            progress(f"training of {name}, batch {batch}: done")
    return measured


def _memory(options: Options, found: Sequence[Contender], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    num_rows, batch = options.rows or NUM_ROWS, max(options.training_batches)
    measured = []
    for name in options.models:
        shape = Shape(MODELS[name], 2, NUM_NUMERIC, CATEGORIES)
        results = {
            c.name: peak_memory(c.name, shape, num_rows, batch, options.seed, torch.get_num_threads()) for c in found
        }
        measured.append({"model": name, "tasks": 2, "batch": batch, "rows": num_rows, "results": results})
        progress(f"memory of {name}: done")
    return measured


def _rows(options: Options) -> tuple[Rows, tuple[int, ...]]:
    if options.data is None:
        return generated_rows(options.rows or NUM_ROWS, options.seed)
    rows, categories = census_rows(options.data)
    return first(rows, options.rows), categories


def _build(found: Sequence[Contender], shape: Shape, seed: int) -> dict[str, torch.nn.Module]:
    models = {}
    for contender in found:
        torch.manual_seed(seed)
        models[contender.name] = contender.build(shape)
    return models


def _floor_names(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {f"floor: {form}": call for form, call in calls.items()}


def _repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def _row(shape: Shape, batch: int, models: dict[str, torch.nn.Module], timings: dict[str, Timing]) -> dict[str, Any]:
    ours = timings[next(iter(models))]
    floors = {name: timing for name, timing in timings.items() if name.startswith("floor: ")}
    floor = min(floors.values(), key=lambda timing: timing.median)
    return {
        "model": shape.name,
        "tasks": shape.num_tasks,
        "batch": batch,
        "multiply_adds": shape.multiply_adds() * batch,
        "floor": floor.median,
        "floors": {name.removeprefix("floor: "): timing.median for name, timing in floors.items()},
        "results": {
            name: {
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "median": timing.median,
                "best": timing.best,
                "ratio_to_ours": timing.ratio(ours),
                "ratio_to_floor": timing.ratio(floor),
                "seconds": list(timing.seconds),
            }
            for name, timing in timings.items()
            if name in models
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
