"""The tour, with models that train for one epoch."""

import json
from pathlib import Path

import pytest

from moe_mtl.cli import main
from moe_mtl.data import load
from moe_mtl.models import AutoModelForMultiTask
from moe_mtl.pathway import cost

TASKS = ["digit", "parity", "at_least_5", "holes"]
MODELS = ["mmoe", "single-task", "shared-bottom"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The folder, what `--json` prints, and what a person sees, from a second run into the same folder."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["demo", "--output", str(folder), "--train.epochs", "1", "--json"]) == 0
        told = json.loads(printed[-1])
        printed.clear()
        assert main(["demo", "--output", str(folder), "--train.epochs", "1"]) == 0
    return folder, told, "\n".join(printed)


def test_every_model_is_measured_on_every_task(demo: tuple[Path, dict, str]) -> None:
    folder, told, _ = demo
    assert list(told["metrics"]) == MODELS
    assert all(list(metrics) == TASKS for metrics in told["metrics"].values())
    for name in ("mmoe", "shared-bottom"):
        assert told["metrics"][name] == json.loads((folder / name / "metrics.json").read_text())["metrics"]["test"]
    for task in TASKS:
        saved = json.loads((folder / "single-task" / task / "metrics.json").read_text())["metrics"]["test"]
        assert saved == {task: told["metrics"]["single-task"][task]}


def test_costs_are_those_of_the_saved_models(demo: tuple[Path, dict, str]) -> None:
    folder, told, _ = demo
    mmoe = AutoModelForMultiTask.from_pretrained(folder / "mmoe")
    for task in (None, *TASKS):
        found = told["cost"]["mmoe"] if task is None else told["task_cost"][task]["mmoe"]
        expected = cost(mmoe, task)
        assert found == {"touched": expected.touched, "multiply_adds": expected.multiply_adds}
    alone = [told["task_cost"][task]["single-task"]["touched"] for task in TASKS]
    assert told["cost"]["single-task"]["touched"] == sum(alone)


def test_the_extracted_task_answers_the_rows(demo: tuple[Path, dict, str]) -> None:
    folder, told, _ = demo
    assert AutoModelForMultiTask.from_pretrained(folder / "mmoe-digit").tasks == ["digit"]
    assert told["largest_difference"] < 1e-6
    header, *answers = (folder / "digit.csv").read_text().splitlines()
    assert header.startswith('"digit","digit/0"')
    assert len(answers) == len(load("digits").test)
    assert "digit" not in (folder / "rows.csv").read_text().splitlines()[0]


def test_what_a_person_sees(demo: tuple[Path, dict, str]) -> None:
    folder, told, text = demo
    assert all(f"{folder}/{name}" in text for name in ("mmoe", "rows.csv", "digit.csv", "mmoe-digit"))
    assert all(Path(path).exists() for path in told["files"])
    for number in (told["cost"]["mmoe"]["touched"], told["task_cost"]["digit"]["mmoe"]["multiply_adds"]):
        assert f"{number:,}" in text
    assert text.count("\n  moe-mtl ") == 3
