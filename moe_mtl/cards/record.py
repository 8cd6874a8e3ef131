"""The record behind a card, `results.json`: how each number came about, and nothing a reader must take on trust."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from ..training.saved import RECORD

BUDGETS = ("ci", "nightly")
LOWER_IS_BETTER = {"log_loss", "rmse", "mae", "abs_error", "mean_angle"}
DIGITS = 4  # after the point, wherever a measured number is told
SAME_DIGITS = 1e-4  # what a repetition may be off by where packages and processor are the record's

NUMBER = (int, float)
MEASURE = {"values": [NUMBER], "mean": NUMBER, "std": NUMBER}
COST = {"parameters": int, "multiply_adds": int}
DIFFERENCE = {"mean": NUMBER, "ci_low": NUMBER, "ci_high": NUMBER}
FAMILIES = ("table", "language model", "adapter", "vision model")
BASELINES = {
    "table": ("single_task", "shared_bottom"),
    "language model": (),
    "adapter": ("lora", "lora-active", "lora-each"),
    "vision model": ("single_task", "multi_task_vit"),
}
# Types as leaves; [x] is a list of x, {"*": x} a mapping of any names to x, a key with "?" may be absent.
SCHEMA: dict[str, Any] = {
    "name": str,
    "model_type": str,
    "family?": FAMILIES,  # a table where it is missing
    "command": str,
    "recipe": str,
    "recipe_sha256": str,
    "data": {"name": str, "sha256": str, "licence": str, "source?": str, "rows": {"*": int}},
    "seeds": [int],
    "shipped_seed": int,
    "weights": {"sha256": str, "bytes": int, "tensors": int, "elements": int},
    "rows": [
        {
            "model": str,
            "role": ("this", "baseline"),
            "recipe": str,
            "recipe_sha256": str,
            **COST,
            "metrics": {"*": {"*": MEASURE}},
        }
    ],
    "single_task_cost": {"*": {**COST, "experts?": {"kept": [int], "of": int}}},
    "comparison": [{"baseline": str, "task": str, "metric": str, **DIFFERENCE}],
    "bootstrap": {"resamples": int, "confidence": NUMBER, "groups?": int},  # groups: of rows drawn together
    "tolerance?": {"*": NUMBER},  # of older records; it follows from the values now
    "wall_s": NUMBER,
    "hardware": str,
    "packages": {"*": str},
    "budget": BUDGETS,
    # Exact match on the validation rows over the steps, a list per seed.
    "curves?": {"*": {"step": [NUMBER], "exact_match": [[NUMBER]]}},
    # Of the test pictures, by layer: see `measure_routing`.
    "routing?": {
        "layers": {"*": {"shares": {"*": [NUMBER]}, "information": [NUMBER], "at_random": NUMBER}},
        "pictures": [{"image": str, "experts": {"*": [[int]]}}],
        "shown": str,
    },
    # `differences`: the shipped weights minus the tool, on the same resampled rows.
    "external?": [
        {
            "model": str,
            "source": str,
            "metrics": {"*": {"*": NUMBER}},
            "differences?": {"*": {"*": DIFFERENCE}},
        }
    ],
}


def measure(values: list[float]) -> dict[str, Any]:
    """Values of one metric over the seeds, with their mean and sample standard deviation (0 for one seed)."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"values": values, "mean": statistics.fmean(values), "std": std}


def tolerance(metric: str, entry: Mapping[str, Any]) -> float:
    """How far a repetition of one seed may be off on another machine, where sums are added up in another order.

    Twice the spread of this very row, task and metric over the seeds, but never more than what a reader would call
    another result: 0.01 for a metric between 0 and 1, a quarter of the value for a loss. Three seeds may by luck
    agree, so never less than 0.003, or a twentieth of the value.
    """
    lowest, highest = (0.05, 0.25) if metric in LOWER_IS_BETTER else (0.003, 0.01)
    scale = abs(entry["mean"]) if metric in LOWER_IS_BETTER else 1.0
    return float(f"{min(max(2 * entry['std'], lowest * scale), highest * scale):.2g}")


def load_record(folder: str | Path) -> dict[str, Any]:
    """The record of a card's folder.

    Raises:
        ModelNotFoundError, CheckpointError: no record, or no JSON.
        ValueError: it does not follow the schema; every problem is listed.
    """
    record = read_json(folder, RECORD)
    problems = record_problems(record)
    if problems:
        raise ValueError(f"{RECORD} of {folder}: " + "; ".join(problems))
    return record


def family(record: Mapping[str, Any]) -> str:
    """What kind of model a record is of."""
    return record.get("family", FAMILIES[0])


def this_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the card's own model."""
    return next(row for row in record["rows"] if row["role"] == "this")


def record_problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a record: types and keys first, then whether its parts agree. Empty if nothing is."""
    problems = _schema_problems(record, SCHEMA, "")
    return problems or _disagreements(record)


def _schema_problems(value: Any, schema: Any, where: str) -> list[str]:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where or 'record'}: expected an object, found {value!r:.60}"]
        if "*" in schema:
            return [p for key, item in value.items() for p in _schema_problems(item, schema["*"], f"{where}.{key}")]
        known = {key.removesuffix("?"): inner for key, inner in schema.items()}
        prefix = f"{where}." if where else ""
        problems = [f"{prefix}{key}: unknown key" for key in value if key not in known]
        problems += [f"{prefix}{key}: missing" for key in schema if not key.endswith("?") and key not in value]
        return problems + [
            p for key, inner in known.items() if key in value for p in _schema_problems(value[key], inner, prefix + key)
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list, found {value!r:.60}"]
        return [p for i, item in enumerate(value) for p in _schema_problems(item, schema[0], f"{where}[{i}]")]
    if isinstance(schema, tuple) and isinstance(schema[0], str):
        return [] if value in schema else [f"{where}: expected one of {', '.join(schema)}, found {value!r:.60}"]
    kinds = schema if isinstance(schema, tuple) else (schema,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return [f"{where}: expected {' or '.join(kind.__name__ for kind in kinds)}, found {value!r:.60}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where}: expected a finite number, found {value!r}"]
    return [f"{where}: expected text, found none"] if value == "" else []


def _disagreements(record: Mapping[str, Any]) -> list[str]:
    problems = []
    own = [row for row in record["rows"] if row["role"] == "this"]
    if len(own) != 1:
        return [f"rows: expected one row with the role 'this', found {len(own)}"]
    models = [row["model"] for row in record["rows"]]
    if len(set(models)) < len(models):
        problems.append(f"rows: expected each model once, found {', '.join(models)}")
    for baseline in BASELINES[family(record)]:
        if baseline not in models:
            problems.append(f"rows: expected the baseline {baseline}, found {', '.join(models)}")
    if len(set(record["seeds"])) < max(3, len(record["seeds"])):
        problems.append(f"seeds: expected at least 3 different ones, found {record['seeds']}")
    if record["shipped_seed"] not in record["seeds"]:
        problems.append(f"shipped_seed: expected one of {record['seeds']}, found {record['shipped_seed']}")
    if own[0]["model"] != record["model_type"] or own[0]["recipe_sha256"] != record["recipe_sha256"]:
        problems.append("rows: the row with the role 'this' has another model or recipe than the record")
    measured = {(task, metric) for task, metrics in own[0]["metrics"].items() for metric in metrics}
    for row in record["rows"]:
        found = {(task, metric) for task, metrics in row["metrics"].items() for metric in metrics}
        if found != measured:
            problems.append(f"rows.{row['model']}: expected the metrics of {own[0]['model']}, found {sorted(found)}")
        for task, metric in sorted(found):
            entry = row["metrics"][task][metric]
            if len(entry["values"]) != len(record["seeds"]):
                problems.append(f"rows.{row['model']}.{task}.{metric}: expected one value per seed")
            elif any(
                not math.isclose(entry[key], measure(entry["values"])[key], abs_tol=1e-9) for key in ("mean", "std")
            ):
                problems.append(f"rows.{row['model']}.{task}.{metric}: mean or std is not that of the values")
    for entry in record["comparison"]:
        where = f"comparison with {entry['baseline']} on {entry['task']} {entry['metric']}"
        if entry["baseline"] not in models or (entry["task"], entry["metric"]) not in measured:
            problems.append(f"{where}: no such row or metric")
        if entry["ci_low"] > entry["ci_high"]:
            problems.append(f"{where}: the ends of the interval are swapped")
    for row in record.get("external", []):
        told = {(task, metric) for task, metrics in row["metrics"].items() for metric in metrics}
        apart = {(task, metric) for task, metrics in row.get("differences", {}).items() for metric in metrics}
        if not told <= measured or (apart and apart != told):
            problems.append(f"external.{row['model']}: expected tasks and metrics of {own[0]['model']}, each compared")
    for model, curve in record.get("curves", {}).items():
        if model not in models or {len(values) for values in curve["exact_match"]} != {len(curve["step"])}:
            problems.append(f"curves.{model}: expected a value per step and seed, of a model of the table")
    for task in record["single_task_cost"].keys() ^ own[0]["metrics"].keys():
        problems.append(f"single_task_cost: expected the tasks that are measured, found a difference in {task}")
    return problems
