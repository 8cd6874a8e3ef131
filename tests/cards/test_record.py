import copy
import json
import re

import pytest

from moe_mtl.cards.record import load_record, measure, record_problems, tolerance


def test_measure():
    assert measure([1.0, 2.0, 6.0]) == {"values": [1.0, 2.0, 6.0], "mean": 3.0, "std": pytest.approx(7**0.5)}
    assert measure([0.5])["std"] == 0.0


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("auc", [0.990, 0.992, 0.994], 0.004),  # twice the spread of these values
        ("auc", [0.99, 0.99, 0.99], 0.003),  # luck: never near 0
        ("auc", [0.80, 0.90, 0.95], 0.01),  # a spread that would let any model pass
        ("accuracy", [0.95, 0.96, 0.97], 0.01),
        ("log_loss", [0.14, 0.15, 0.16], 0.02),
        ("log_loss", [0.15, 0.15, 0.15], 0.0075),
        ("log_loss", [0.044, 0.052, 0.170], 0.022),  # the parity row that let 0.218 pass
        ("rmse", [1000.0, 1040.0, 1080.0], 80.0),
    ],
)
def test_the_tolerance_is_of_the_row_and_never_vacuous(metric, values, expected):
    assert tolerance(metric, measure(values)) == pytest.approx(expected, rel=0.01)


def test_records_with_a_tolerance_by_metric_are_still_read(card):
    record = load_record(card)
    assert record_problems(record | {"tolerance": {"auc": 0.01}}) == []


def set_at(record: dict, path: str, value: object) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in parents:
        record = record[key]
    if value is None:
        del record[last]
    else:
        record[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("command", None, "command: missing"),
        ("command", "", "command: expected text"),
        ("note", "x", "note: unknown key"),
        ("data/licence", None, "data.licence: missing"),
        ("data/rows/test", 1.5, "data.rows.test: expected int"),
        ("budget", "huge", "budget: expected one of ci, nightly"),
        ("wall_s", True, "wall_s: expected int or float"),
        ("wall_s", float("nan"), "wall_s: expected a finite number"),
        ("seeds", [0, 1, 1], "seeds: expected at least 3 different ones"),
        ("seeds", [0, 1], "seeds: expected at least 3 different ones"),
        ("seeds", "three", "seeds: expected a list"),
        ("shipped_seed", 7, "shipped_seed: expected one of"),
        ("rows/0/role", "baseline", "one row with the role 'this'"),
        ("rows/1/model", "other", "expected the baseline single_task"),
        ("rows/2/model", "single_task", "each model once"),
        ("rows/0/model", "ple", "another model or recipe"),
        ("recipe_sha256", "0", "another model or recipe"),
        ("rows/1/metrics/digit", None, "rows.single_task: expected the metrics of mmoe"),
        ("rows/1/metrics/digit/accuracy/values", [0.9], "one value per seed"),
        ("rows/1/metrics/digit/accuracy/mean", 0.999, "mean or std is not that of the values"),
        ("rows/1/metrics/digit/accuracy/std", 0.0, "mean or std is not that of the values"),
        ("tolerance", 0.1, "tolerance: expected an object"),
        ("comparison/0/baseline", "lightgbm", "no such row or metric"),
        ("comparison/0/metric", "rmse", "no such row or metric"),
        ("comparison/0/ci_low", 0.9, "swapped"),
        ("single_task_cost/digit", None, "single_task_cost: .* digit"),
    ],
)
def test_each_alteration_is_a_problem(card, path, value, message):
    record = load_record(card)
    assert record_problems(record) == []
    altered = copy.deepcopy(record)
    set_at(altered, path, value)
    problems = record_problems(altered)
    assert any(re.search(message, problem) for problem in problems), problems


def test_load_record_lists_every_problem(card):
    record = load_record(card)
    del record["command"], record["seeds"]
    (card / "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="command: missing; seeds: missing"):
        load_record(card)
