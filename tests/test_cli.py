"""The command line, in process, on models that take seconds; a few things only a process of its own can show."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from moe_mtl import cli
from moe_mtl.cards.record import load_record, this_row
from moe_mtl.checkpoint import Checkpoint
from moe_mtl.cli import COMMANDS, main
from moe_mtl.cli._arguments import UsageError, split_overrides
from moe_mtl.cli._console import quiet_libraries, table
from moe_mtl.data import TabularProcessor, load
from moe_mtl.hub import zoo, zoo_folder
from moe_mtl.models import REGISTRY, AutoModelForMultiTask
from moe_mtl.pathway import cost
from moe_mtl.tuners import METHODS

SMALL = ["--train.epochs", "1", "--model.num_experts=2", "--model.expert_dims", "[8]", "--model.tower_dims=[4]"]
TASKS = ["digit", "parity", "at_least_5", "holes"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "digits"
    arguments = ["--train.eval_batch_size", "100", "--train.early_stopping", "null", "--seed", "3"]
    assert main(["train", "digits/mmoe", "--output", str(folder), *SMALL, *arguments]) == 0
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test rows of digits, labels and a number of the row included."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    test = load("digits").test
    pa.csv.write_csv(test.append_column("row", pa.array(range(len(test)))), path)
    return path


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    """The message of a command that must fail: one line, exit code 2, nothing on stdout."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.splitlines()[-1]
    assert message.startswith("moe-mtl: error: ")
    assert "Traceback" not in captured.err
    return message.removeprefix("moe-mtl: error: ")


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_mtl.cli", *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, **options)


# --- help and usage ---


def test_help_of_every_command_without_torch() -> None:
    calls = [["--help"], [], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys\nfrom moe_mtl.cli import main\n"
        f"for call in {calls!r}:\n    assert main(call) == 0\n"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
        assert f"usage: moe-mtl {name}" in done.stdout


def test_every_file_is_a_command_and_every_command_a_file() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "digits/mmoe"], "unknown command 'trian'; did you mean 'train'?"),
        (["--hlp"], "unknown option '--hlp'"),
        (["recipes", "cpoy"], "did you mean 'copy'?"),
        (["cost", "x", "--taks", "a"], "unknown option '--taks'; did you mean '--task'?"),
        (["cost"], "the following arguments are required: MODEL; see moe-mtl cost --help"),
        (["cost", "a", "b"], "unexpected argument 'b'; see moe-mtl cost --help"),
        (
            ["cost", "a", "--train.epochs", "1"],
            "unknown option '--train.epochs': moe-mtl cost sets no keys of a recipe",
        ),
        (["train", "digits/mmoe", "--train.epochs"], "--train.epochs: expected a value"),
        (["train", "digits/mmo"], "did you mean 'digits/mmoe'?"),
        (
            ["train", "digits/mmoe", "--train.epoch", "2"],
            "section 'train': unknown key 'epoch'; did you mean 'epochs'?",
        ),
        (["train", "digits/mmoe", "--trian.epochs", "2"], "unknown section 'trian'; did you mean 'train'?"),
        (["train", "digits/mmoe", "--data.name", "digit"], "unknown data set 'digit'; did you mean 'digits'?"),
        (["train", "digits/mmoe", "--model.num_expert", "2"], "did you mean 'num_experts'?"),
        (["train", "digits/mmoe", "--model.num_experts", "0"], "num_experts must be an integer in [1, 4096], found 0"),
        (["predict", "digits", "rows.csv", "--batch-size", "0"], "expected an integer of at least 1, found '0'"),
        (["predict", "digits", "rows.csv", "--keep", "a"], "--keep writes columns into a file: it needs --output"),
        (["evaluate", "x", "--data", "f.csv", "--split", "test"], "--data measures files"),
        (["recipes", "show"], "expected the name of a recipe"),
        (["cards", "make"], "expected one recipe, found 0"),
        (["cards", "check", "--model.type", "ple"], "a card is made from its recipe as it stands"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []  # raised before any work


def test_overrides_are_told_from_options() -> None:
    overrides, rest = split_overrides(["r", "--a.b", "-1", "--output", "x.y", "--c.d=e=f", "--data=v1.csv"])
    assert overrides == [("a.b", "-1"), ("c.d", "e=f")]
    assert rest == ["r", "--output", "x.y", "--data=v1.csv"]
    with pytest.raises(UsageError, match=r"--a\.b: expected a value"):
        split_overrides(["--a.b", "--c"])


def test_traceback_on_request(capsys: pytest.CaptureFixture) -> None:
    assert run("train", "digits/none", "--traceback") == 2
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert captured.splitlines()[-1].startswith("moe-mtl: error: ")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from moe_mtl.cli import recipes

    def interrupt(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "run", interrupt)
    assert run("recipes") == 130
    assert capsys.readouterr().err == "moe-mtl: interrupted\n"


def test_nobody_reads_on() -> None:
    command = [sys.executable, "-m", "moe_mtl.cli", "--help"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        started.stdout.close()
        assert started.stderr.read() == b""
        assert started.wait() == 141


def test_only_our_warnings_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from moe_mtl.cli import recipes

    def warn(arguments: Any) -> None:
        warnings.warn("theirs", UserWarning, stacklevel=1)
        space = {"__name__": "moe_mtl.somewhere", "warnings": warnings}
        exec("def f():\n    warnings.warn('ours\\nfor sure', stacklevel=3)\nf()", space)

    monkeypatch.setattr(recipes, "run", warn)
    shown = warnings.showwarning
    assert run("recipes") == 0
    assert capsys.readouterr().err == "moe-mtl: warning: ours for sure\n"
    assert warnings.showwarning is shown


def test_the_libraries_are_quiet_only_inside() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_tables_align_and_mark_what_is_missing() -> None:
    assert table([]) == "(none)"
    assert table(
        [{"name": "a", "n": 1234, "x": 0.5}, {"name": "long", "x": float("nan"), "last": [1, 2]}]
    ).splitlines() == [
        "name      n       x  last",
        "----  -----  ------  ----",
        "a     1,234  0.5000  -",
        "long      -       -  1, 2",
    ]


# --- models, recipes, cards ---


def test_models(capsys: pytest.CaptureFixture) -> None:
    assert run("models", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["type"] for row in told["types"]] == sorted(REGISTRY)
    assert all(row["paper"] for row in told["types"])
    assert run("models") == 0
    text = capsys.readouterr().out
    assert all(f"\n{row['type']} " in text and row["paper"] in text for row in told["types"])
    methods = {str(name).lower() for name in METHODS.values()}
    assert {row["method"] for row in told["methods"]} == methods
    for row in told["models"]:
        if row["type"] in {*methods, "llama"}:
            with pytest.raises(ValueError, match="load_adapter" if row["type"] in methods else "a language model"):
                AutoModelForMultiTask.from_pretrained(row["name"])
            assert row["parameters"] == this_row(load_record(zoo()[row["name"]]))["parameters"]
            continue
        model = AutoModelForMultiTask.from_pretrained(row["name"])
        assert (row["type"], row["tasks"]) == (model.config.model_type, model.tasks)
        (line,) = (line for line in text.splitlines() if line.startswith(f"{row['name']} "))
        assert f" {row['parameters']:,} " in line
        found = cost(model)
        vision = model.main_input_name == "pixel_values"  # which experts a picture touches depends on it
        assert row["parameters"] == (found.stored if vision else found.touched)


def test_models_lists_the_zoo(trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_mtl.hub.zoo", lambda: {"mmoe-digits": trained})
    monkeypatch.setattr("moe_mtl.cli.models._test", lambda folder: ["digit accuracy 0.9"])
    assert run("models", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    parameters = AutoModelForMultiTask.from_pretrained(trained).num_parameters()
    expected = {"name": "mmoe-digits", "type": "mmoe", "parameters": parameters, "tasks": TASKS}
    assert row == expected | {"test": ["digit accuracy 0.9"]}


def test_recipes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run("recipes", "--json") == 0
    listed = {row["recipe"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["digits/mmoe"]["model"] == "mmoe"
    assert run("recipes") == 0
    assert "digits/mmoe" in capsys.readouterr().out
    assert run("recipes", "show", "digits/mmoe") == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["model"]["type"] == "mmoe"
    copy = tmp_path / "mine.yaml"
    assert run("recipes", "copy", "digits/mmoe", copy) == 0
    assert copy.read_text() == shown
    assert run("recipes", "copy", "digits/mmoe", tmp_path) == 0
    assert (tmp_path / "mmoe.yaml").exists()
    capsys.readouterr()
    copy.write_text("mine")
    assert "exists already" in fails(capsys, "recipes", "copy", "digits/mmoe", copy)
    assert copy.read_text() == "mine"


def test_bench_options_are_those_of_the_measurement(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_mtl.bench import tabular

    measured = []
    monkeypatch.setattr(tabular, "run", lambda options, progress: measured.append(options) or {"bench": "tabular"})
    assert (
        run("bench", "tabular", "--models", "mmoe", "ple-1", "--batches", "1", "--training-rounds", "2", "--json") == 0
    )
    assert json.loads(capsys.readouterr().out) == {"bench": "tabular"}
    assert measured == [tabular.Options(models=("mmoe", "ple-1"), batches=(1,), training_rounds=2)]
    assert run("bench", "tabular", "--help") == 0
    told = capsys.readouterr().out
    assert all(f"--{field.replace('_', '-')}" in told for field in tabular.Options.__dataclass_fields__)
    assert "did you mean '--models'?" in fails(capsys, "bench", "tabular", "--model", "mmoe")
    assert "models: expected one of" in fails(capsys, "bench", "tabular", "--models", "moe")
    assert "did you mean 'tabular'?" in fails(capsys, "bench", "tabluar")


def test_cards_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("cards", "check", "mmoe-digits") == 0
    assert capsys.readouterr().out == "the cards are as their records give them\n"
    assert run("cards", "check", "mmoe-digits", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    broken = tmp_path / "mmoe-digits"
    shutil.copytree(zoo_folder() / "mmoe-digits", broken)
    (broken / "notes.txt").touch()
    (broken / "README.md").unlink()
    found = ["mmoe-digits: expected the file README.md, found none", "mmoe-digits: notes.txt: no file of a card"]
    assert run("cards", "check", broken) == 2
    assert capsys.readouterr().out.splitlines() == found
    assert run("cards", "check", broken, "--json") == 2
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(("measured", "code"), [(0.91, 0), (0.8, 2)])
def test_cards_reproduce(
    measured: float, code: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_mtl.cards.repeating import Repetition

    def reproduce(names: Any, **options: Any) -> list[Repetition]:
        assert names == ["one"]
        assert options["budget"] == "ci"
        assert options["data_path"] == "rows.gz"
        return [Repetition("one", "mmoe", "digit", "accuracy", 0, 0.9, measured, 0.02)]

    monkeypatch.setattr("moe_mtl.cards.repeating.reproduce", reproduce)
    assert run("cards", "reproduce", "one", "--data.path", "rows.gz", "--json") == code
    (row,) = json.loads(capsys.readouterr().out)
    assert row["measured"] == measured
    assert row["agrees"] is (code == 0)


# --- train, evaluate, predict ---


def test_train_writes_a_folder_that_loads(trained: Path) -> None:
    assert AutoModelForMultiTask.from_pretrained(trained).tasks == TASKS
    assert TabularProcessor.from_pretrained(trained).features
    recipe = yaml.safe_load((trained / "recipe.resolved.yaml").read_text())
    assert recipe["train"]["seed"] == 3
    assert recipe["model"]["expert_dims"] == [8]
    assert not list(trained.glob("checkpoint-*"))


def test_train_prints_what_it_saved(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run("train", "digits/mmoe", "--output", tmp_path / "a", *SMALL, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["metrics"] == json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]
    assert list(record["metrics"]["test"]) == TASKS


def test_train_keeps_what_is_in_the_way(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt" in fails(capsys, "train", "digits/mmoe", "--output", tmp_path, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]["test"]


def test_evaluate_gives_the_numbers_of_training(trained: Path, rows: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("evaluate", trained, "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == metrics_of(trained)
    assert run("evaluate", trained, "--data", rows, "--task", "parity", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"parity": metrics_of(trained)["parity"]}
    assert run("evaluate", trained, "--split", "validation") == 0
    text = capsys.readouterr().out
    assert "validation rows of digits" in text
    assert all(task in text for task in TASKS)


def read_answers(path: Path) -> dict[str, np.ndarray]:
    """With readers that know nothing of this library."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            records = list(csv.DictReader(file))
    elif path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        records = pq.read_table(path).to_pylist()
    return {name: np.array([float(record[name]) for record in records]) for name in records[0]}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predictions_give_the_numbers_of_evaluation_exactly(
    suffix: str, trained: Path, rows: Path, tmp_path: Path
) -> None:
    answers = tmp_path / f"answers{suffix}"
    assert run("predict", trained, rows, "--output", answers, "--keep", "row") == 0
    found, test = read_answers(answers), load("digits").test.to_pydict()
    assert found["row"].tolist() == list(range(len(test["digit"])))
    expected = metrics_of(trained)
    for task in ("parity", "at_least_5"):
        label, score = np.array(test[task]), found[task]
        assert roc_auc_score(label, score) == expected[task]["auc"]
        losses = -(label * np.log(score) + (1 - label) * np.log1p(-score))
        assert float(np.average(losses)) == expected[task]["log_loss"]
    for task, classes in (("digit", 10), ("holes", 3)):
        label = np.array(test[task])
        score = np.stack([found[f"{task}/{c}"] for c in range(classes)], axis=1)
        assert (found[task] == label).mean() == expected[task]["accuracy"]
        assert float(np.average(-np.log(score[np.arange(len(label)), label]))) == expected[task]["log_loss"]
    assert [path.name for path in tmp_path.iterdir()] == [answers.name]


def test_predict_to_stdout(trained: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("predict", trained, rows, "--task", "parity") == 0
    lines = capsys.readouterr().out.splitlines()
    assert run("predict", trained, rows, "--output", tmp_path / "a.jsonl", "--task", "parity") == 0
    assert [json.loads(line) for line in lines] == list(
        map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    )
    assert list(json.loads(lines[0])) == ["parity"]


def test_predict_and_evaluate_refuse(trained: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "a.csv"
    for command in (["predict", trained, rows, "--output", output], ["evaluate", trained], ["cost", trained]):
        message = fails(capsys, *command, "--task", "digits")
        assert message.startswith("unknown task 'digits'; known tasks: digit, parity, at_least_5, holes")
    short = tmp_path / "short.csv"
    short.write_text("p00,p01\n1,2\n")
    assert "rows: missing columns 'p02', 'p03'" in fails(capsys, "predict", trained, short, "--output", output)
    unlabelled = tmp_path / "unlabelled.csv"
    pa.csv.write_csv(load("digits").test.drop_columns(["holes"]), unlabelled)
    assert "missing column 'holes'" in fails(capsys, "evaluate", trained, "--data", unlabelled)
    text = rows.read_text().splitlines()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("\n".join([*text[:5], "x" + text[5][text[5].index(",") :], *text[6:]]))
    assert "column 'p00', row 4" in fails(capsys, "predict", trained, wrong, "--output", output)
    assert "no such file" in fails(capsys, "predict", trained, tmp_path / "none.csv", "--output", output)
    assert "expected a name that ends in .csv" in fails(
        capsys, "predict", trained, rows, "--output", tmp_path / "a.txt"
    )
    (tmp_path / "empty.csv").touch()
    assert "the file is empty" in fails(capsys, "predict", trained, tmp_path / "empty.csv", "--output", output)
    assert not output.exists()


def test_not_a_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "expected a model folder, a zoo name or a Hub id" in fails(capsys, "cost", "mmoe-digit")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in trained.iterdir():
        if path.name != "manifest.json":
            (broken / path.name).write_bytes(path.read_bytes())
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in fails(capsys, "cost", broken)
    assert "truncated" in fails(capsys, "extract", broken, "digit", "--output", tmp_path / "out")
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "pytorch_model.bin")
    assert "pickles can run code and are refused" in fails(capsys, "evaluate", broken)
    assert not (tmp_path / "out").exists()


# --- one task ---


def test_extract(trained: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = tmp_path / "small"
    assert run("extract", trained, "holes", "digit", "--output", small, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    full = AutoModelForMultiTask.from_pretrained(trained)
    assert told["tasks"] == AutoModelForMultiTask.from_pretrained(small).tasks == ["digit", "holes"]
    assert told["parameters"] == cost(full, ["digit", "holes"]).touched < told["parameters_of_all"]
    assert Checkpoint(small).num_elements == told["parameters"]
    assert list(TabularProcessor.from_pretrained(small).labels) == ["digit", "holes"]
    # It needs no other label, and remembers where its rows came from.
    assert run("evaluate", small, "--json") == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    for task in ("digit", "holes"):
        assert found[task] == pytest.approx(metrics_of(trained)[task], abs=1e-6)
    unlabelled = tmp_path / "rows.csv"
    pa.csv.write_csv(load("digits").test.drop_columns(["parity", "at_least_5"]), unlabelled)
    assert run("evaluate", small, "--data", unlabelled, "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == found
    for model, name in ((trained, "full"), (small, "small")):
        assert run("predict", model, rows, "--task", "holes", "--output", tmp_path / f"{name}.parquet") == 0
    a, b = (read_answers(tmp_path / f"{name}.parquet") for name in ("full", "small"))
    assert a.keys() == b.keys()
    assert all(np.allclose(a[name], b[name], rtol=0, atol=1e-6) for name in a)


def test_extract_folds_batch_norms(tmp_path: Path) -> None:
    rows = load("digits").test
    answers = []
    for fold in ([], ["--fold"]):
        output = tmp_path / f"digit{len(fold)}"
        assert run("extract", "home-digits", "digit", "--output", output, *fold) == 0
        model = AutoModelForMultiTask.from_pretrained(output)
        assert model.config.batch_norm is not bool(fold)
        answers.append(model(**TabularProcessor.from_pretrained(output)(rows, labels=False)).logits["digit"])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_extract_refuses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "small"
    assert "unknown task 'odd'" in fails(capsys, "extract", trained, "odd", "--output", output)
    assert "required: --output" in fails(capsys, "extract", trained, "digit")
    assert not output.exists()
    output.mkdir()
    (output / "thesis.tex").touch()
    assert "thesis.tex" in fails(capsys, "extract", trained, "digit", "--output", output)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_cost(trained: Path, capsys: pytest.CaptureFixture) -> None:
    model = AutoModelForMultiTask.from_pretrained(trained)
    assert run("cost", trained, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == [json.loads(json.dumps(cost(model, task).to_dict())) for task in (None, *TASKS)]
    assert run("cost", trained, "--task", "digit", "holes", "--json") == 0
    assert [one["tasks"] for one in json.loads(capsys.readouterr().out)] == [["digit", "holes"]]
    assert run("cost", trained) == 0
    text = capsys.readouterr().out
    assert f"{told[0]['touched']:,}" in text
    assert all(f"\n{task} " in text for task in ("all", *TASKS))


# --- processes of their own ---


def test_exit_codes_and_silence_of_a_process(trained: Path, rows: Path, tmp_path: Path) -> None:
    done = process("predcit", "x", "y")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe-mtl: error: unknown command 'predcit'; did you mean 'predict'?\n"
    done = process("evaluate", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe-mtl: error: expected a model folder, a zoo name or a Hub id")
    assert done.stderr.count("\n") == 1
    done = process("predict", trained, rows, "--task", "parity")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(load("digits").test)


# --- tables of one's own ---


def test_train_marks_a_metric_that_is_not_defined_and_tells_what_was_inferred(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parts = ["train", "validation", "test"] * 30
    labels = [0 if part == "validation" else row % 2 for row, part in enumerate(parts)]
    pq.write_table(pa.table({"x": np.arange(90.0) + 0.5, "y": labels, "part": parts}), tmp_path / "rows.parquet")
    recipe = tmp_path / "mine.yaml"
    content = {
        "data": {"name": "table", "path": str(tmp_path / "rows.parquet"), "split_column": "part"},
        "model": {"type": "mmoe", "num_experts": 2, "expert_dims": [4]},
        "train": {"max_steps": 1},
    }
    content["data"]["tasks"] = [{"name": "y", "kind": "binary"}]
    recipe.write_text(json.dumps(content))
    assert run("train", recipe, "--output", tmp_path / "out") == 0
    told = capsys.readouterr()
    assert [line.split()[:3] for line in told.out.splitlines() if "validation" in line] == [["validation", "y", "-"]]
    assert "  x: numeric (30 distinct numbers)" in told.err.splitlines()


def test_an_extracted_conversion_is_measured_on_the_clicked_rows_as_in_the_full_model(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2000))
    click = rng.random(2000) < 1 / (1 + np.exp(-x))
    bought = click & (rng.random(2000) < 1 / (1 + np.exp(-y)))
    columns = {"x": x, "y": y, "click": click.astype(int), "conversion": bought.astype(int)}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    keys = ["--data.path", tmp_path / "rows.parquet", "--train.epochs", "2", "--train.learning_rate", "0.01"]
    assert run("train", "table/esmm", "--output", tmp_path / "full", *keys) == 0
    assert run("extract", tmp_path / "full", "conversion", "--output", tmp_path / "small") == 0
    capsys.readouterr()
    for source in ([], ["--data", tmp_path / "rows.parquet"]):
        found = []
        for folder in ("full", "small"):
            assert run("evaluate", tmp_path / folder, *source, "--task", "conversion", "--json") == 0
            found.append(json.loads(capsys.readouterr().out)["metrics"])
        assert found[0] == found[1]
    # Fine-tuned, it does not take rows without a click for rows without a conversion.
    rows = TabularProcessor.from_pretrained(tmp_path / "small")(tmp_path / "rows.parquet")
    assert torch.equal(torch.isnan(rows["labels"]["conversion"]), torch.tensor(~click))
