"""Recipes from file to folder, on a few rows; predictions against evaluation."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from moe_mtl import AutoModelForMultiTask, TabularProcessor, data
from moe_mtl.data import DataError, DataSplits, census_income
from moe_mtl.tasks import Task, UnknownTaskError
from moe_mtl.training import predict as predicting
from moe_mtl.training import run as running
from moe_mtl.training.predict import predict, predict_file
from moe_mtl.training.recipe import RecipeError, list_recipes, load_recipe, parse_recipe
from moe_mtl.training.run import evaluate, run
from moe_mtl.training.watch import TrainingDivergedError

SHORT = [("train.epochs", "null"), ("train.max_steps", "2"), ("train.batch_size", "32"), ("train.logging_steps", "1")]


def census_rows(n, seed):
    """Rows with the columns of Census-Income, of few values each."""
    rng = np.random.default_rng(seed)
    columns = {name: pa.array(rng.choice(["x", "y", "z"], n)) for name in census_income.COLUMNS}
    columns |= {name: pa.array(rng.integers(0, 9, n).astype(str)) for name in census_income.NUMERIC}
    for label in census_income.LABELS.values():
        positive = label["positive"] if isinstance(label["positive"], str) else label["positive"][0]
        columns[label["column"]] = pa.array(rng.choice([positive, label.get("negative", "another")], n))
    return pa.table(columns)


def census(options):
    tasks = options.get("tasks", ("income", "never_married"))
    removed = {census_income.LABELS[task]["column"] for task in tasks}
    removed |= {"instance_weight", "income_50k", *options.get("exclude", ())}
    return DataSplits(
        **{part: census_rows(60, seed) for seed, part in enumerate(("train", "validation", "test"))},
        features=[
            {"name": name, "kind": "numeric" if name in census_income.NUMERIC else "categorical"}
            for name in census_income.COLUMNS
            if name not in removed
        ],
        tasks=[Task(task, "binary") for task in tasks],
        labels={task: dict(census_income.LABELS[task]) for task in tasks},
        info={"name": "census-income-half", "sha256": "0" * 64},
    )


@pytest.fixture
def few_rows(monkeypatch, tmp_path):
    """Every data set, with few rows."""
    load = data.load

    def small(name, **options):
        if name == "census-income":
            return census(options)
        if name == "mmoe-synthetic":
            options |= {"train_rows": 64, "validation_rows": 40, "test_rows": 40}
        if name == "multitab-bench":
            options |= {"num_rows": 200}
        if name == "table":
            rng = np.random.default_rng(0)
            click = rng.integers(0, 2, 300)
            bought = click * rng.integers(0, 2, 300)
            columns = {"click": click, "purchase": bought, "conversion": bought, "age": rng.normal(size=300)}
            columns["city"] = rng.choice(["Rome", "Oslo", "Lima"], 300)
            options["path"] = str(tmp_path / "rows.parquet")
            pyarrow.parquet.write_table(pa.table(columns), options["path"])
            columns = {task["name"] for task in options["tasks"]}
            options["exclude"] = sorted({"click", "purchase", "conversion"} - columns)
        return load(name, **options)

    monkeypatch.setattr(running.data, "load", small)


@pytest.fixture
def base_for_add_task(few_rows, tmp_path):
    recipe = load_recipe("census-income/mmoe", [*SHORT, ("data.exclude", "[education]")])
    return run(recipe, tmp_path / "base", progress=False)


# Those of text are run by test_text_recipes.py and test_instruct_recipes.py, of pictures by test_image_recipes.py.
TEXT_OR_PICTURES = (data.is_text, data.is_images)
TABLES = [n for n in list_recipes() if not any(kind(load_recipe(n).data.name) for kind in TEXT_OR_PICTURES)]


@pytest.mark.parametrize("name", [name for name in TABLES if not name.endswith("add-task")])
def test_every_recipe_trains_saves_and_predicts_what_it_evaluates(few_rows, tmp_path, name):
    recipe = load_recipe(name, SHORT)
    result = run(recipe, tmp_path / "out", progress=False)
    assert set(result.metrics) == {"validation", "test"}
    assert set(result.metrics["test"]) == set(result.model.tasks)
    assert all(isinstance(loss, float) for loss in result.record["loss"].values())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.record
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.resolved.yaml"} <= names
    assert not [entry for entry in names if entry.startswith((".", "checkpoint-"))]
    again = evaluate(tmp_path / "out", "test")
    assert {task: {k: v for k, v in values.items() if v == v} for task, values in again.metrics.items()} == {
        task: {k: v for k, v in values.items() if v is not None} for task, values in result.metrics["test"].items()
    }


def test_adding_a_task_keeps_the_old_answers_bit_for_bit(base_for_add_task, tmp_path):
    base = base_for_add_task.output_dir
    recipe = load_recipe("census-income/add-task", [*SHORT, ("model.from", str(base)), ("train.learning_rate", "0.1")])
    result = run(recipe, tmp_path / "grown", progress=False)
    old, new = (AutoModelForMultiTask.from_pretrained(folder).eval() for folder in (base, tmp_path / "grown"))
    assert new.tasks == ["income", "never_married", "education"]
    rows = TabularProcessor.from_pretrained(tmp_path / "grown")(census_rows(50, 9), labels=False)
    with torch.no_grad():
        before, after = old(**rows).logits, new(**rows).logits
    for task in old.tasks:
        assert torch.equal(before[task], after[task])
    assert result.metrics["test"]["education"]["auc"] is not None
    trained = {name for name, _ in new.named_parameters()} - {name for name, _ in old.named_parameters()}
    assert {name.split(".")[0] for name in trained} == {"towers", "trunk"}
    assert all("education" in name for name in trained)


def test_a_task_whose_label_the_model_has_read_cannot_be_added(few_rows, tmp_path):
    run(load_recipe("census-income/mmoe", SHORT), tmp_path / "base", progress=False)
    with pytest.raises(DataError, match="'education'"):
        run(load_recipe("census-income/add-task", [*SHORT, ("model.from", str(tmp_path / "base"))]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropping_a_task_and_freezing_by_pattern(base_for_add_task, tmp_path):
    content = {
        "data": {"name": "census-income", "exclude": ["education"]},
        "model": {
            "from": str(base_for_add_task.output_dir),
            "drop_tasks": ["income"],
            "freeze": ["encoder.*"],
            "dropout": 0.5,
        },
        "train": {"max_steps": 2},
    }
    result = run(parse_recipe(content), tmp_path / "out", progress=False)
    assert result.model.tasks == ["never_married"]
    assert result.model.config.dropout == 0.5
    old, new = base_for_add_task.model.state_dict(), result.model.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in new if name.startswith("encoder."))
    assert any(not torch.equal(new[name], old[name]) for name in new if name.startswith("trunk."))


MODEL_ERRORS = [
    ({"type": "mmoee"}, "model.type.*'mmoe'"),
    ({"type": "mmoe", "num_expert": 3}, "unknown key 'num_expert': mmoe has no such field; did you mean 'num_experts'"),
    ({"type": "mmoe", "typ": 1}, "unknown key 'typ': mmoe has no such field; known: tasks, "),
    ({"type": "mmoe", "num_experts": "three"}, "section 'model'.*num_experts"),
    ({"type": "mmoe", "num_experts": 0}, "num_experts"),
    ({"type": "mmoe", "features": []}, "comes from the data"),
    ({"type": "mmoe", "tasks": ["digits"]}, "model.tasks: unknown task 'digits'; did you mean 'digit'"),
    ({"type": "mmoe", "tasks": []}, "model.tasks: expected at least one"),
    ({"type": "mmoe", "freeze": ["tower.*"]}, r"model.freeze: no parameter is called 'tower\.\*'"),
]


@pytest.mark.parametrize(("model", "message"), MODEL_ERRORS)
def test_errors_of_the_model_section_leave_nothing(tmp_path, model, message):
    with pytest.raises(RecipeError, match=message):
        run(parse_recipe({"data": {"name": "digits"}, "model": model}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_errors_of_other_sections_come_before_training(tmp_path):
    plain = {"data": {"name": "digits"}, "model": {"type": "mmoe"}}
    for change, message in [
        ({"data": {"name": "digit"}}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"data": {"name": "digits", "task": []}}, "unknown option 'task'; did you mean 'tasks'"),
        ({"train": {"task_weights": {"digits": 1}}}, "unknown task 'digits'; did you mean 'digit'"),
        ({"train": {"gradient_balancing": "PCGard"}}, "did you mean 'PCGrad'"),
        ({"train": {"loss_balancing": "FAMO"}}, "FAMO is not supported"),
        ({"train": {"early_stopping": {"metric": "digit/auc"}}}, "unknown metric 'digit/auc'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(parse_recipe({**plain, **change}), tmp_path / "out", progress=False)


def tiny(**train):
    sections = {"data": {"name": "digits"}, "model": {"type": "mmoe", "num_experts": 2, "expert_dims": [8]}}
    sections["model"]["numeric_embedding"] = "scaled"
    return parse_recipe({**sections, "train": {"max_steps": 3, "batch_size": 64, **train}, "eval": {"bootstrap": 20}})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small model of the digits, and the test rows in three kinds of file."""
    folder = tmp_path_factory.mktemp("digits")
    # A batch size that does not divide the 355 rows.
    result = run(tiny(max_steps=20, eval_batch_size=100), folder / "model", progress=False)
    table = data.load("digits").test
    pyarrow.csv.write_csv(table, folder / "rows.csv")
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    return folder, result, table


READ = {
    "csv": lambda path: pd.read_csv(path, float_precision="round_trip"),
    "parquet": pd.read_parquet,
    "jsonl": lambda path: pd.DataFrame([json.loads(line) for line in open(path)]),  # noqa: SIM115
}


@pytest.mark.parametrize(
    ("source", "kind"), [("csv", "csv"), ("parquet", "jsonl"), ("jsonl", "parquet"), ("csv", "jsonl")]
)
def test_metrics_of_the_predicted_file_are_those_of_evaluation(digits, tmp_path, source, kind):
    folder, result, table = digits
    out = tmp_path / f"out.{kind}"
    done = predict_file(folder / "model", folder / f"rows.{source}", out, keep=["p00"])
    frame = READ[kind](out)
    assert (done.rows, done.columns) == (355, list(frame.columns))
    assert done.columns[0] == "p00"
    metrics = result.metrics["test"]
    for task in ("parity", "at_least_5"):
        assert roc_auc_score(table[task].to_numpy(), frame[task]) == metrics[task]["auc"]
    for task, classes in (("digit", 10), ("holes", 3)):
        truth = table[task].to_numpy()
        scores = frame[[f"{task}/{c}" for c in range(classes)]].to_numpy()
        assert (frame[task].to_numpy() == truth).mean() == metrics[task]["accuracy"]
        losses = -np.log(scores[np.arange(len(truth)), truth])
        assert float(np.average(losses)) == metrics[task]["log_loss"]


def test_predictions_do_not_depend_on_the_pieces_of_the_source(digits):
    folder, result, table = digits
    processor = result.processor
    whole = list(predict(result.model, processor, table, batch_size=100))
    assert [len(chunk["parity"]) for chunk in whole] == [100, 100, 100, 55]
    pieces = list(predict(result.model, processor, folder / "rows.csv", batch_size=100))
    for left, right in zip(whole, pieces, strict=True):
        assert all(np.array_equal(left[name], right[name]) for name in left)
    one = next(predict(result.model, processor, table, batch_size=100, tasks="parity"))
    assert list(one) == ["parity"]
    assert np.array_equal(one["parity"], whole[0]["parity"])


def test_predicting_one_task_of_a_folder(digits, tmp_path):
    folder, _, _ = digits
    done = predict_file(folder / "model", folder / "rows.csv", tmp_path / "out.csv", tasks=["holes"])
    assert done.columns == ["holes", "holes/0", "holes/1", "holes/2"]


def test_errors_of_prediction_leave_no_output(digits, tmp_path):
    folder, _, table = digits
    model, rows, out = folder / "model", folder / "rows.csv", tmp_path / "out.csv"
    out.write_text("the earlier file")
    bad = tmp_path / "bad.csv"
    values = table.drop_columns(["p11"]).append_column("p11", pa.array(["1"] * 354 + ["many"]))
    pyarrow.csv.write_csv(values, bad)
    lacking = tmp_path / "lacking.csv"
    pyarrow.csv.write_csv(table.drop_columns(["p11"]), lacking)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    for arguments, options, error in [
        ((model, rows, tmp_path / "out.txt"), {}, RecipeError),
        ((model, rows, tmp_path / "nowhere" / "out.csv"), {}, FileNotFoundError),
        ((model, rows, out), {"tasks": ["digits"]}, UnknownTaskError),
        ((model, rows, out), {"keep": ["p99"]}, RecipeError),
        ((model, rows, out), {"keep": ["parity"]}, RecipeError),
        ((model, tmp_path / "none.csv", out), {}, FileNotFoundError),
        ((model, bad, out), {}, DataError),
        ((model, lacking, out), {}, DataError),
        ((model, empty, out), {}, DataError),
    ]:
        with pytest.raises(error):
            predict_file(*arguments, **options)
    assert out.read_text() == "the earlier file"
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "bad.csv", "lacking.csv", "empty.csv"}


def test_a_full_disk_leaves_no_prediction(digits, tmp_path, monkeypatch):
    folder, _, _ = digits

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        predict_file(folder / "model", folder / "rows.csv", tmp_path / "out.csv")
    assert not list(tmp_path.iterdir())


def test_the_record_tells_what_was_run(digits):
    folder, result, _ = digits
    record = result.record
    assert record["seed"] == 0
    assert record["steps"] == 20
    assert record["eval_batch_size"] == 100
    assert record["data"]["rows"] == {"train": 1083, "validation": 359, "test": 355}
    resolved = folder / "model" / "recipe.resolved.yaml"
    assert load_recipe(resolved).sha256 == record["recipe_sha256"]
    assert 0.005 < record["standard_error"]["test"]["parity"]["auc"] < 0.1
    assert parse_recipe(yaml.safe_load(resolved.read_text())).train.batch_size == 64


def test_seeds_decide_the_run(tmp_path):
    first, second, third = (
        run(tiny(), tmp_path / str(i), seed=seed, progress=False) for i, seed in enumerate((1, 1, 2))
    )
    assert first.metrics == second.metrics != third.metrics


def test_an_interrupted_run_resumes_and_nothing_else_takes_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = run(tiny(max_steps=30), tmp_path / "whole", progress=False)
    train = running.MultiTaskTrainer.training_step

    def dying(trainer, model, inputs, count=None):
        if trainer.state.global_step == 20:  # 17 steps are an epoch
            raise KeyboardInterrupt
        return train(trainer, model, inputs, count)

    with monkeypatch.context() as patch:
        patch.setattr(running.MultiTaskTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(max_steps=30), tmp_path / "out", progress=False)
    assert not [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("checkpoint-")]
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(tiny(max_steps=30), tmp_path / "out", progress=False)
    (tmp_path / "out" / ".checkpoint-18.staging-0123abcd").mkdir()  # what a kill during a save leaves
    with pytest.raises(RecipeError, match="another recipe or seed"):
        run(tiny(max_steps=31), tmp_path / "out", progress=False, resume=True)
    resumed = run(tiny(max_steps=30), tmp_path / "out", progress=False, resume=True)
    assert resumed.metrics == whole.metrics
    with pytest.raises(RecipeError, match="no unfinished run"):
        run(tiny(), tmp_path / "new", progress=False, resume=True)
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis.txt"):
        run(tiny(), folder, progress=False)


def test_a_run_is_not_resumed_on_other_rows(own_table, tmp_path, monkeypatch):
    """More rows can order a vocabulary anew, and old weights would then stand for other values."""
    monkeypatch.setattr(running, "SECONDS_BETWEEN_SAVES", 0.0)
    content = {"data": {**own_table, "tasks": [{"name": "click", "kind": "binary"}]}, "model": {"type": "mmoe"}}
    recipe = parse_recipe({**content, "train": {"epochs": 3, "batch_size": 32}})
    train = running.MultiTaskTrainer.training_step

    def dying(trainer, *args):
        if trainer.state.global_step == 10:
            raise KeyboardInterrupt
        return train(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(running.MultiTaskTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", progress=False)
    rows = pyarrow.parquet.read_table(own_table["path"])
    pyarrow.parquet.write_table(pa.concat_tables([rows, rows[:20]]), own_table["path"])
    with pytest.raises(RecipeError, match=r"unfinished run on other rows: the data changed since checkpoint-8"):
        run(recipe, tmp_path / "out", progress=False, resume=True)
    pyarrow.parquet.write_table(rows, own_table["path"])
    run(recipe, tmp_path / "out", progress=False, resume=True)


def test_a_run_that_fails_leaves_the_model_that_stood_there_as_it_was(tmp_path, monkeypatch):
    run(tiny(), tmp_path / "out", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def diverging(trainer, model, inputs, count=None):
        raise TrainingDivergedError("loss of task 'digit' is not finite")

    monkeypatch.setattr(running.MultiTaskTrainer, "training_step", diverging)
    with pytest.raises(TrainingDivergedError):
        run(tiny(learning_rate=0.5), tmp_path / "out", progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.fixture
def own_table(tmp_path):
    """The data section of a table: a click, what it is about, and whose it is."""
    rng = np.random.default_rng(0)
    click = rng.integers(0, 2, 300)
    columns = {"click": click, "bought": click * rng.integers(0, 2, 300), "age": rng.normal(size=300)}
    columns |= {"city": rng.choice(["Rome", "Oslo", "Lima"], 300), "user": rng.integers(0, 9, 300)}
    columns["tags"] = np.array([f"{a}|{b}" for a, b in rng.integers(0, 5, (300, 2))])
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return {"name": "table", "path": str(tmp_path / "rows.parquet"), "exclude": ["user", "bought"]}


def test_what_cannot_be_is_told_before_anything_is_written(own_table, tmp_path, monkeypatch):
    task = {"name": "click", "kind": "binary", "metrics": ["auc", "group_auc"]}
    recipe = {"data": {**own_table, "tasks": [task]}, "model": {"type": "mmoe"}, "train": {"max_steps": 2}}
    with pytest.raises(RecipeError, match=r"'click' reports group_auc: .* data\.group_column"):
        run(parse_recipe(recipe), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    found = run(parse_recipe(recipe, [("data.group_column", "user")]), tmp_path / "grouped", progress=False)
    assert 0 <= found.metrics["test"]["click"]["group_auc"] <= 1
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    monkeypatch.setattr(running, "load_data", lambda recipe: pytest.fail("data were read"))
    with pytest.raises(RecipeError, match=r"train\.report_to: trackio is not installed"):
        run(tiny(report_to="trackio"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved_click(own_table, tmp_path):
    """A data section, and the folder of a model of its click that was saved."""
    data = {**own_table, "tasks": [{"name": "click", "kind": "binary", "weight": 0.5}]}
    content = {"data": data, "model": {"type": "mmoe"}, "train": {"max_steps": 2}}
    return data, run(parse_recipe(content), tmp_path / "saved", progress=False).output_dir


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "bought"}, r"data\.tasks: click: columns: expected \['click'\], as .* found \['bought'\]"),
        ({"weight_column": "age"}, "click: weight_column: expected None"),
        ({"metrics": ["accuracy"]}, "click: metrics: expected None"),
        ({"weight": 1.0}, "click: weight: expected 0.5"),
        ({"positive": 1}, "click: positive: expected None"),
        ({"kind": "multiclass"}, "click: kind: expected 'binary'"),
    ],
)
def test_a_task_of_a_saved_model_is_not_declared_otherwise(saved_click, tmp_path, change, message):
    data, folder = saved_click
    data = {**data, "tasks": [data["tasks"][0] | change]}
    with pytest.raises(RecipeError, match=message):
        run(parse_recipe({"data": data, "model": {"from": str(folder)}}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_a_saved_model_would_leave_aside_is_refused(saved_click, tmp_path):
    data, folder = saved_click
    further = [*data["tasks"], {"name": "bought", "kind": "binary"}]
    for options, message in [
        ({"tasks": further}, "'bought' is no task of .*: name it in model.add_tasks"),
        ({"features": [{"name": "age", "kind": "numeric"}]}, r"data\.features: expected \[\('age', 'numeric'\), "),
        ({"missing_values": ["", "NA"]}, r"data\.missing_values: expected \[''\]"),
    ]:
        recipe = parse_recipe({"data": data | options, "model": {"from": str(folder)}})
        with pytest.raises(RecipeError, match=message):
            run(recipe, tmp_path / "out", progress=False)
    with pytest.raises(RecipeError, match=r"data\.tasks: expected none, as the saved model keeps its own"):
        evaluate(folder, overrides=[("data.tasks", "[{name: click, kind: binary, column: bought}]")])
    told = []
    recipe = parse_recipe({"data": data, "model": {"from": str(folder)}, "train": {"max_steps": 1}})
    run(recipe, tmp_path / "out", progress=False, tell=told.append)
    assert not told  # no column's kind is chosen anew


def test_a_task_that_others_are_made_of_cannot_be_dropped(few_rows, tmp_path):
    recipe = load_recipe("table/esmm", [("data.path", "rows"), *SHORT])
    full = run(recipe, tmp_path / "full", progress=False)
    data = {"name": "table", "path": "rows", **recipe.data.options}
    recipe = parse_recipe({"data": data, "model": {"from": str(full.output_dir), "drop_tasks": ["click"]}})
    with pytest.raises(RecipeError, match=r"drop_tasks: 'click' cannot go, as .*click_and_conversion needs it"):
        run(recipe, tmp_path / "out", progress=False)


def test_a_product_is_measured_without_its_factors(few_rows, tmp_path):
    recipe = load_recipe("table/esmm", [("data.path", "rows"), *SHORT])
    full = run(recipe, tmp_path / "full", progress=False)
    whole, found = evaluate(full.output_dir), evaluate(full.output_dir, tasks="click_and_conversion")
    assert found.metrics == {"click_and_conversion": whole.metrics["click_and_conversion"]}
    assert found.loss < whole.loss


def test_a_task_without_a_row_that_counts_is_refused(tmp_path):
    click = np.arange(300) % 2
    columns = {"x": np.arange(300.0), "click": click, "buy": np.where(click, np.nan, 1.0), "nothing": np.zeros(300)}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    for field, message in (("space", "in the space of 'click'"), ("weight_column", "none has a label and a weight$")):
        value = "click" if field == "space" else "nothing"
        tasks = [{"name": "click", "kind": "binary"}, {"name": "buy", "kind": "binary", field: value}]
        data = {"name": "table", "path": str(tmp_path / "rows.parquet"), "tasks": tasks, "exclude": ["nothing"]}
        with pytest.raises(RecipeError, match=f"no training row counts for task 'buy': .*{message}"):
            run(parse_recipe({"data": data, "model": {"type": "mmoe"}}), tmp_path / "out", progress=False)


def test_what_the_processor_gives_is_what_the_model_takes(own_table, tmp_path):
    data = {**own_table, "tasks": [{"name": "click", "kind": "binary"}], "group_column": "user"}
    result = run(
        parse_recipe({"data": data, "model": {"type": "mmoe"}, "train": {"max_steps": 1}}),
        tmp_path / "out",
        progress=False,
    )
    encoded = result.processor(pyarrow.parquet.read_table(own_table["path"]))
    assert "groups" in encoded
    assert result.model(**encoded).loss.isfinite()


def test_dropping_the_space_of_a_task_keeps_the_rows_it_counts(own_table, tmp_path):
    tasks = [{"name": "click", "kind": "binary"}, {"name": "bought", "kind": "binary", "space": "click"}]
    content = {"data": {**own_table, "tasks": tasks}, "model": {"type": "mmoe"}, "train": {"max_steps": 2}}
    full = run(parse_recipe(content), tmp_path / "full", progress=False)
    dropping = {**content, "model": {"from": str(full.output_dir), "drop_tasks": ["click"]}}
    choosing = {**content, "model": {"type": "mmoe", "tasks": ["bought"]}}
    table = data.load(**own_table, tasks=tasks).test.read()
    clicked = torch.tensor(table["click"].to_pylist()) == 1
    for name, recipe in (("dropped", dropping), ("chosen", choosing)):
        result = run(parse_recipe(recipe), tmp_path / name, progress=False)
        assert result.model.tasks == ["bought"]
        assert torch.equal(~torch.isnan(result.processor(table)["labels"]["bought"]), clicked)


def test_what_was_inferred_is_told_before_training(own_table, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(running, "make_trainer", lambda *_: pytest.fail("training began") if not told else 1 / 0)
    recipe = {"data": {**own_table, "tasks": [{"name": "click", "kind": "binary"}]}, "model": {"type": "mmoe"}}
    with pytest.raises(ZeroDivisionError):
        run(parse_recipe(recipe), tmp_path / "out", progress=False, tell=told.append)
    assert told[0].startswith("age: numeric (")
    assert any(note.startswith("tags: categorical") and "multi_hot" in note for note in told)


def test_a_metric_that_is_not_defined_is_null_in_the_record(tmp_path):
    rows = pa.table({"x": np.arange(90.0), "y": np.zeros(90), "part": ["train", "validation", "test"] * 30})
    labels = [0 if part == "validation" else i % 2 for i, part in enumerate(rows["part"].to_pylist())]
    rows = rows.set_column(1, "y", pa.array(labels))
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    data = {"name": "table", "path": str(tmp_path / "rows.parquet"), "split_column": "part"}
    recipe = {"data": {**data, "tasks": [{"name": "y", "kind": "binary"}]}, "model": {"type": "mmoe"}}
    with pytest.warns(UserWarning, match="auc of task 'y' is not defined"):
        result = run(parse_recipe({**recipe, "train": {"max_steps": 1}}), tmp_path / "out", progress=False)
    assert result.metrics["validation"]["y"]["auc"] is None


def test_a_card_is_predicted_with_the_batches_of_its_recipe(digits, tmp_path, monkeypatch):
    folder, _, _ = digits
    card = tmp_path / "card"
    shutil.copytree(folder / "model", card)
    for name in ("metrics.json", "manifest.json"):  # a card has no metrics
        (card / name).unlink()
    sizes = []

    def counting(model, processor, source, batch_size, tasks):
        sizes.append(batch_size)
        return predict(model, processor, source, batch_size, tasks)

    monkeypatch.setattr(predicting, "predict", counting)
    predict_file(card, folder / "rows.csv", tmp_path / "own.csv")
    (card / "recipe.resolved.yaml").unlink()
    (card / "results.json").write_text(json.dumps({"recipe": "digits/mmoe"}))
    predict_file(card, folder / "rows.csv", tmp_path / "named.csv")
    assert sizes == [100, load_recipe("digits/mmoe").train.eval_batch_size]


def test_tensorboard_gets_losses_metrics_and_routing(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny(report_to="tensorboard", logging_steps=1), tmp_path / "out", progress=False)
    events = EventAccumulator(str(tmp_path / "out" / "runs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in ("train/loss", "train/loss/parity", "eval/parity/auc", "train/routing/experts/parity/entropy"):
        assert tag in tags, tags


def test_fine_tuning_a_trunk_that_depends_on_the_number_of_tasks_is_refused(few_rows, tmp_path):
    run(load_recipe("census-income/ple", [*SHORT, ("data.exclude", "[education]")]), tmp_path / "base", progress=False)
    with pytest.raises(RecipeError, match="a ple cannot keep its weights"):
        run(load_recipe("census-income/add-task", [*SHORT, ("model.from", str(tmp_path / "base"))]), tmp_path / "out")
