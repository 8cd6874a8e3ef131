"""What commands say of the files that they are given, and which columns of them they need."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from moe_mtl.cli import main

SMALL = ["--train.epochs", "1", "--model.num_experts", "2", "--model.expert_dims", "[4]"]
TASKS = [
    {"name": "click", "kind": "binary", "weight_column": "click_weight"},
    {"name": "price", "kind": "regression", "weight": 0.5, "weight_column": "price_weight", "space": "bought"},
    {"name": "bought", "kind": "binary", "weight_column": "bought_weight"},
    {"name": "both", "kind": "binary", "all_of": ["click", "bought"]},
]


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("moe-mtl: error: ")


def table(rows: int = 400) -> pa.Table:
    rng = np.random.default_rng(0)
    labels: dict[str, Any] = {name: rng.integers(0, 2, rows) for name in ("click", "bought")}
    weights = {f"{name}_weight": rng.random(rows) + 0.5 for name in ("click", "price", "bought")}
    return pa.table({"x": rng.normal(size=rows), "price": rng.normal(size=rows) * 10, **labels, **weights})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of CSV that semicolons cut, beside its rows."""
    folder = tmp_path_factory.mktemp("files")
    pa.csv.write_csv(table(), folder / "rows.csv", pa.csv.WriteOptions(delimiter=";"))
    keys = ["--data.path", folder / "rows.csv", "--data.delimiter", "';'", "--data.tasks", json.dumps(TASKS)]
    keys += ["--train.task_weights", "{price: 3, click: 0.25}"]
    assert run("train", "table/mmoe", "--output", folder / "model", *keys, *SMALL) == 0
    return folder


def evaluate(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert run("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_and_predict_cut_csv_as_in_training_unless_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, rows, commas = folder / "model", folder / "rows.csv", tmp_path / "commas.csv"
    pa.csv.write_csv(table(), commas)
    found = evaluate(capsys, model, "--data", rows)
    assert evaluate(capsys, model, "--data", commas, "--delimiter", ",")["metrics"] == found["metrics"]
    answers = []
    for source in ([rows], [commas, "--delimiter", ","]):
        assert run("predict", model, *source) == 0
        answers.append(capsys.readouterr().out)
        assert run("predict", model, *source, "--output", tmp_path / "out.jsonl") == 0
        assert (tmp_path / "out.jsonl").read_text() == answers[-1]
        capsys.readouterr()
    assert answers[0] == answers[1]
    assert "one ASCII character" in fails(capsys, "predict", model, rows, "--delimiter", ";;")
    assert "--data.delimiter" in fails(capsys, "evaluate", model, "--delimiter", ";")
    assert "one ASCII character" in fails(capsys, "predict", model, rows, "--delimiter", "")
    tabs = tmp_path / "tabs.tsv"
    pa.csv.write_csv(table(), tabs, pa.csv.WriteOptions(delimiter="\t"))
    assert evaluate(capsys, model, "--data", tabs)["metrics"] == found["metrics"]


def test_evaluating_again_gives_the_numbers_of_training(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """The loss too, with the weights that the recipe gave the tasks."""
    model = folder / "model"
    trained = json.loads((model / "metrics.json").read_text())
    found = evaluate(capsys, model)
    assert found["loss"] == trained["loss"]["test"]
    assert found["metrics"] == trained["metrics"]["test"]


def test_tasks_of_a_saved_model_are_not_declared_anew(folder: Path, capsys: pytest.CaptureFixture) -> None:
    other = json.dumps([TASKS[0] | {"column": "bought"}])
    message = fails(capsys, "evaluate", folder / "model", "--data.tasks", other)
    assert message.startswith("data.tasks: expected none, as the saved model keeps its own")


def test_a_table_without_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pa.csv.write_csv(table(0), tmp_path / "none.csv", pa.csv.WriteOptions(delimiter=";"))
    for keep in ([], ["--keep", "x"]):
        arguments = ["predict", folder / "model", tmp_path / "none.csv", *keep, "--output", tmp_path / "out.csv"]
        assert "expected at least one row" in fails(capsys, *arguments)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("tasks", "unused"),
    [
        (["click"], ["price", "bought", "price_weight", "bought_weight"]),
        (["price"], ["click", "click_weight", "bought_weight"]),
        (["both"], ["price", "price_weight", "click_weight", "bought_weight"]),
        (["click", "price"], ["bought_weight"]),
    ],
)
def test_evaluating_some_tasks_needs_their_columns_alone_and_tells_their_loss(
    tasks: list[str], unused: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = folder / "model"
    whole = evaluate(capsys, model, "--data", folder / "rows.csv")
    pa.csv.write_csv(table().drop_columns(unused), tmp_path / "some.csv")
    found = evaluate(capsys, model, "--data", tmp_path / "some.csv", "--delimiter", ",", "--task", *tasks)
    assert found["metrics"] == {task: whole["metrics"][task] for task in whole["metrics"] if task in tasks}
    assert found["loss"] != whole["loss"]
    same = evaluate(capsys, model, "--data", folder / "rows.csv", "--task", *tasks)
    assert same["loss"] == found["loss"]


def test_the_losses_of_single_tasks_sum_to_that_of_all(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model, names = folder / "model", [task["name"] for task in TASKS]
    for source in (["--data", folder / "rows.csv"], ["--split", "validation"]):
        whole = evaluate(capsys, model, *source)["loss"]
        losses = [evaluate(capsys, model, *source, "--task", name)["loss"] for name in names]
        assert sum(losses) == pytest.approx(whole)
        assert evaluate(capsys, model, *source, "--task", *names)["loss"] == whole


def test_an_unknown_task_is_told_before_the_rows_are_read(folder: Path, capsys: pytest.CaptureFixture) -> None:
    message = fails(capsys, "evaluate", folder / "model", "--data", "none.csv", "--task", "clicks")
    assert message.startswith("unknown task 'clicks'")


def test_recipes_copy_names_the_path_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for dest in (f"{tmp_path}/nodir/x/", f"{tmp_path}/nodir/"):
        assert fails(capsys, "recipes", "copy", "digits/mmoe", dest) == f"there is no folder {dest}"
    dest = f"{tmp_path}/nodir/x.yaml"
    message = fails(capsys, "recipes", "copy", "digits/mmoe", dest)
    assert message == f"{dest}: there is no folder {tmp_path}/nodir"
    assert not list(tmp_path.iterdir())
