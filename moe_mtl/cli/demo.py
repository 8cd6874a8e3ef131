"""A tour in a minute, nothing downloaded: trains an MMoE on handwritten digits (four tasks), a shared bottom and one
model per task with the same budget, takes one task out, answers rows with it, and compares.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from ._arguments import Parser
from ._console import metric_rows, print_json, quiet_libraries, say, table

RECIPE, BASELINE = "digits/mmoe", "digits/shared_bottom"
OUTPUT = "runs/demo"
SINGLE, SHARED = "single-task", "shared-bottom"


def configure(parser: Parser) -> None:
    parser.add_argument("--output", default=OUTPUT, metavar="DIR", help=f"folder to write; by default {OUTPUT}")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_json()
    parser.add_overrides()


def run(arguments: argparse.Namespace) -> None:
    with quiet_libraries():
        told = demo(Path(arguments.output), arguments.seed, arguments.overrides)
    print_json(told) if arguments.json else _print(told)


def demo(output: Path, seed: int, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """Runs the tour; tells metrics and costs by model and task, and what was written."""
    from ..pathway import cost
    from ..training.recipe import load_recipe
    from .extract import extract

    start = time.perf_counter()
    # Interrupted, it starts anew: no checkpoints.
    changes = [("train.save_steps", "0"), *overrides]
    recipe, baseline = load_recipe(RECIPE, changes), load_recipe(BASELINE, changes)
    own = str(recipe.model.type)
    say(f"Training on {recipe.data.name}: {own}, then {SHARED} and {SINGLE} with the same budget.\n")

    model = _train(own, recipe, output / own, seed)
    shared = _train(SHARED, baseline, output / SHARED, seed)
    tasks = model.model.tasks
    single = {}
    for task in tasks:
        alone = dataclasses.replace(baseline, model=dataclasses.replace(baseline.model, tasks=[task]))
        single[task] = _train(f"{SINGLE} {task}", alone, output / SINGLE / task, seed)

    chosen = tasks[0]
    small = output / f"{own}-{chosen}"
    extract(output / own, [chosen], small)
    rows, answers = output / "rows.csv", output / f"{chosen}.csv"
    count = _write_rows(recipe, model.processor, rows)
    agrees = _predict(model, small, rows, answers)
    say(f"\nTook the task {chosen!r} out, answered {count:,} unlabelled rows with it:")
    say(f"  the same answers as the full model: {'yes, bit for bit' if agrees == 0 else f'up to {agrees:.1e}'}\n")

    def costs(results: Any) -> dict[str, int]:
        counted = [cost(one.model) for one in results]
        return {key: sum(vars(one)[key] for one in counted) for key in ("touched", "multiply_adds")}

    return {
        "model": own,
        "seed": seed,
        "metrics": {
            own: model.metrics["test"],
            SINGLE: {task: single[task].metrics["test"][task] for task in tasks},
            SHARED: shared.metrics["test"],
        },
        "cost": {own: costs([model]), SINGLE: costs(single.values()), SHARED: costs([shared])},
        "task_cost": {
            task: {
                own: _cost(cost(model.model, task)),
                SINGLE: _cost(cost(single[task].model)),
                SHARED: _cost(cost(shared.model, task)),
            }
            for task in tasks
        },
        "largest_difference": agrees,
        "files": [str(path) for path in (output / own, output / SHARED, output / SINGLE, small, rows, answers)],
        "seconds": time.perf_counter() - start,
    }


def _train(name: str, recipe: Any, folder: Path, seed: int) -> Any:
    from ..training.run import run as train

    result = train(recipe, folder, seed=seed)
    scores = ", ".join(f"{r['task']} {list(r.values())[1]:.4f}" for r in metric_rows(result.metrics["test"]))
    say(f"  {name:24} {result.record['steps']:5,} steps {result.record['seconds']['train']:6.1f} s   test: {scores}")
    return result


def _write_rows(recipe: Any, processor: Any, path: Path) -> int:
    """The test rows without their labels."""
    import io

    import pyarrow.csv

    from ..data import open_source
    from ..files import write_atomically
    from ..training.run import load_data

    rows = open_source(load_data(recipe).test).read([feature["name"] for feature in processor.features])
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(rows, buffer)
    write_atomically(path, buffer.getvalue())
    return rows.num_rows


def _predict(full: Any, small: Path, rows: Path, answers: Path) -> float:
    """Writes the small model's answers; returns how far they are from the full model's, at most."""
    import numpy as np

    from ..data import open_source
    from ..training.predict import predict, predict_file
    from ..training.saved import batch_size_of

    batch_size = batch_size_of(small)
    done = predict_file(small, rows, answers, batch_size=batch_size)
    table_of_small = open_source(answers).read()
    expected = list(predict(full.model, full.processor, rows, batch_size))
    columns = {name: np.concatenate([chunk[name] for chunk in expected]) for name in done.columns}
    found = {name: np.array(table_of_small[name].to_pylist(), dtype=np.float64) for name in done.columns}
    return max(float(np.abs(found[name] - columns[name].astype(np.float64)).max()) for name in done.columns)


def _cost(one: Any) -> dict[str, int]:
    return {"touched": one.touched, "multiply_adds": one.multiply_adds}


def _print(told: dict[str, Any]) -> None:
    own, models = told["model"], list(told["metrics"])
    print("Test metrics (one seed: small differences mean nothing; the cards in the zoo have several):\n")
    print(
        table(
            [
                {"task": task, "metric": metric} | {model: told["metrics"][model][task][metric] for model in models}
                for task, values in told["metrics"][own].items()
                for metric in values
            ]
        )
    )
    for key, what in (("touched", "Parameters read"), ("multiply_adds", "Multiply-adds per row")):
        print(f"\n{what} to answer:\n")
        rows = [{"task": "all"} | {model: told["cost"][model][key] for model in models}]
        rows += [{"task": t} | {model: by[model][key] for model in models} for t, by in told["task_cost"].items()]
        print(table(rows))
    print(
        f"\nOne task of {own} still needs every expert, for its gates are dense; CGC, PLE and DSelect-k leave some out."
    )
    print("\nWritten:\n  " + "\n  ".join(told["files"]))
    full, small, rows = told["files"][0], told["files"][3], told["files"][4]
    print(f"\nDone in {told['seconds']:.0f} s. Next:")
    print(f"  moe-mtl cost {full}")
    print(f"  moe-mtl predict {small} {rows} | head -3")
    print("  moe-mtl recipes copy digits/mmoe mine.yaml")
