"""Predictions of files: what is carried along, how rows are cut, where the answers go."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_mtl.data import sources
from moe_mtl.training.predict import predict_file
from moe_mtl.training.recipe import RecipeError, parse_recipe
from moe_mtl.training.run import run

ROWS = 300


def train(folder: Path, path: Path, **options: Any) -> Path:
    recipe = {
        "data": {"name": "table", "path": str(path), "tasks": [{"name": "click", "kind": "binary"}], **options},
        "model": {"type": "mmoe", "num_experts": 2, "expert_dims": [4]},
        "train": {"max_steps": 1, "eval_batch_size": 64},
    }
    run(parse_recipe(recipe), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    lines = [{"age": float(age), "click": int(age > 0)} for age in rng.normal(size=ROWS)]
    return train(folder / "model", write_lines(folder / "train.jsonl", lines))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JSON lines of several blocks, which give the columns other types."""
    lines = [
        {
            "age": 1.0,
            "id": i,
            "number": 1 if i < ROWS // 2 else 1.5,
            "note": None if i < ROWS // 2 else "hello",
            "mixed": 1 if i < ROWS // 2 else "one",
            "tags": None if i < ROWS // 2 else ["a"],
            "large": 2**53 + 1 if i < ROWS // 2 else 1.5,
        }
        for i in range(ROWS)
    ]
    half = "".join(json.dumps(line) + "\n" for line in lines[: ROWS // 2])
    monkeypatch.setattr(sources, "BLOCK_BYTES", len(half) - 1)  # the types change where a block ends
    return write_lines(tmp_path / "rows.jsonl", lines)


def test_kept_columns_of_json_lines_may_change_their_type(model: Path, changing: Path, tmp_path: Path) -> None:
    keep = ["id", "number", "note", "mixed"]
    half = ROWS // 2
    for suffix in (".jsonl", ".csv"):
        out = tmp_path / f"out{suffix}"
        assert predict_file(model, changing, out, keep=keep).rows == ROWS
        with open(out, newline="") as file:
            found = list(map(json.loads, file)) if suffix == ".jsonl" else list(csv.DictReader(file))
        assert list(found[0]) == [*keep, "click"]
        assert [int(row["id"]) for row in found] == list(range(ROWS))
        assert [float(row["number"]) for row in found] == [1.0] * half + [1.5] * half
        assert [row["note"] or None for row in found] == [None] * half + ["hello"] * half
        assert [str(row["mixed"]) for row in found] == ["1"] * half + ["one"] * half


def test_kept_columns_in_parquet_have_the_type_that_holds_all_values(
    model: Path, changing: Path, tmp_path: Path
) -> None:
    predict_file(model, changing, tmp_path / "out.parquet", keep=["id", "number", "note", "tags"])
    found = pq.read_table(tmp_path / "out.parquet").to_pydict()
    half = ROWS // 2
    assert found["id"] == list(range(ROWS))
    assert found["number"] == [1.0] * half + [1.5] * half
    assert found["note"] == [None] * half + ["hello"] * half
    assert found["tags"] == [None] * half + [["a"]] * half


@pytest.mark.parametrize(
    ("column", "suffix", "message"),
    [
        ("mixed", ".parquet", r"keep: .*'mixed'.* int64 .* string.*\.jsonl"),
        ("large", ".parquet", r"keep: .*'large'.*9007199254740993.*\.jsonl"),
        ("tags", ".csv", r"keep: .*'tags'.*list<.*string>.*\.jsonl"),
    ],
)
def test_a_kept_column_that_the_output_cannot_hold_is_named(
    column: str, suffix: str, message: str, model: Path, changing: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        predict_file(model, changing, tmp_path / f"out{suffix}", keep=[column])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_column_asked_for_twice_is_kept_once(suffix: str, model: Path, changing: Path, tmp_path: Path) -> None:
    done = predict_file(model, changing, tmp_path / f"out{suffix}", keep=["id", "number", "id"])
    assert done.columns == ["id", "number", "click"]


def test_csv_is_cut_as_in_training_unless_told(model: Path, tmp_path: Path) -> None:
    rows = [(i % 7 + 0.5, i % 2) for i in range(ROWS)]
    files = {}
    for delimiter in ";,":
        files[delimiter] = tmp_path / f"rows{ord(delimiter)}.csv"
        lines = [f"age{delimiter}click", *(f"{age}{delimiter}{click}" for age, click in rows)]
        files[delimiter].write_text("\n".join(lines))
    own = train(tmp_path / "own", files[";"], delimiter=";")
    answers = []
    for folder, source, options in [
        (own, files[";"], {}),
        (own, files[","], {"delimiter": ","}),
        (model, files[","], {}),
        (model, files[";"], {"delimiter": ";"}),
    ]:
        predict_file(folder, source, tmp_path / "out.csv", **options)
        answers.append((tmp_path / "out.csv").read_text())
    assert answers[0] == answers[1] != answers[2] == answers[3]
    lines = write_lines(tmp_path / "rows.jsonl", [{"age": 1.0}])
    assert predict_file(own, lines, tmp_path / "out.csv").rows == 1
    with pytest.raises(RecipeError, match=r"delimiter: .*CSV.*rows\.jsonl"):
        predict_file(own, lines, tmp_path / "out.csv", delimiter=";")


def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(IsADirectoryError, match=r"found a folder: .*/out\.csv$"):
        predict_file(tmp_path / "no model", tmp_path / "no rows.csv", tmp_path / "out.csv")
