import functools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from moe_mtl import data, hub
from moe_mtl.cards import check, making, repeating, variants
from moe_mtl.cards.page import RESULTS, ZOO
from moe_mtl.cards.record import load_record, measure
from moe_mtl.data.tensors import TensorTable
from moe_mtl.models import model_class
from moe_mtl.training.evaluation import evaluate_table
from moe_mtl.training.recipe import RecipeError

WIDTHS = "  numeric_embedding: scaled\n  tower_dims: [4]\n"
RECIPES = {
    "mmoe": f"model:\n  type: mmoe\n  num_experts: 2\n  expert_dims: [4]\n{WIDTHS}card: {{name: mmoe-digits}}\n",
    "shared_bottom": f"model:\n  type: shared_bottom\n  bottom_dims: [4]\n{WIDTHS}",
}
DATA = "data:\n  name: digits\n  options: {tasks: [digit, parity]}\ntrain: {epochs: 1}\n"


@functools.cache
def digits(tasks):
    splits = data.load("digits", tasks=tasks)
    return splits, splits.fit_processor()


def untrained(recipe, output_dir, seed, progress):
    """Stands for training: a fresh model of the seed, saved and measured as a run would."""
    splits, processor = digits(tuple(recipe.data.options["tasks"]))
    tasks = variants.measured_tasks(recipe, splits)
    cls = model_class(recipe.model.type)
    torch.manual_seed(seed)
    config = cls.config_class(
        features=processor.features, tasks=[task.to_dict() for task in tasks], **recipe.model.config
    )
    model = cls(config).eval()
    output_dir.mkdir(parents=True)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    metrics = {
        split: evaluate_table(model, TensorTable(processor(rows)), 512, tasks).metrics
        for split, rows in (("validation", splits.validation), ("test", splits.test))
    }
    (output_dir / "recipe.resolved.yaml").write_text(recipe.to_yaml())
    (output_dir / "metrics.json").write_text(json.dumps({"metrics": metrics, "seconds": {"train": 1.0}}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "data_folder", lambda name: tmp_path / name)
    monkeypatch.setattr("moe_mtl.cards.variants.run_recipe", untrained)
    monkeypatch.setattr(making, "RESAMPLES", 50)
    (tmp_path / "recipes" / "digits").mkdir(parents=True)
    for model, text in RECIPES.items():
        (tmp_path / "recipes" / "digits" / f"{model}.yaml").write_text(DATA + text)
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards" / "TEMPLATE.md").write_text("# {name}\n\nSay in two sentences\n\n" + "\n".join(RESULTS))
    (tmp_path / "model_cards" / "README.md").write_text("\n".join(ZOO))
    return tmp_path / "model_cards"


def test_a_made_card_passes_every_check_and_is_reproduced(zoo, runs, monkeypatch):
    lines = []
    folder = making.make("digits/mmoe", runs=runs, budget="ci", echo=lines.append)
    assert folder == zoo / "mmoe-digits"
    assert len(lines) == 9
    assert check() == []
    record = load_record(folder)

    # The numbers, computed plainly from the saved runs.
    assert record["seeds"] == [0, 1, 2]
    splits, _ = digits(("digit", "parity"))
    labels = splits.test.column("parity").to_numpy()
    digit = splits.test.column("digit").to_numpy()
    aucs, accuracies = [], []
    for seed in record["seeds"]:
        (run,) = runs.glob(f"mmoe-all-*-seed{seed}")
        model, processor = variants.load_trained(run)
        with torch.no_grad():
            logits = model(**processor(splits.test, labels=False)).logits
        aucs.append(roc_auc_score(labels, logits["parity"][:, 0]))
        accuracies.append(accuracy_score(digit, logits["digit"].argmax(1)))
        weights = (run / "model.safetensors").read_bytes()
        assert ((folder / "model.safetensors").read_bytes() == weights) == (seed == record["shipped_seed"])
    own = record["rows"][0]["metrics"]
    np.testing.assert_allclose(own["parity"]["auc"]["values"], aucs, atol=1e-6)
    np.testing.assert_allclose(own["digit"]["accuracy"]["values"], accuracies, atol=1e-6)
    for entry in record["comparison"]:
        baseline = next(row for row in record["rows"] if row["model"] == entry["baseline"])["metrics"]
        means = [m[entry["task"]][entry["metric"]]["mean"] for m in (own, baseline)]
        assert entry["mean"] == pytest.approx(means[0] - means[1], abs=1e-6)
    assert len(record["comparison"]) == 4
    alone = next(row for row in record["rows"] if row["model"] == "single_task")
    together = next(row for row in record["rows"] if row["model"] == "shared_bottom")
    bottom = 64 * 4 + 4 + 64 * 2  # one bottom more: its layer, and a scale and shift per column
    assert together["parameters"] < alone["parameters"] <= together["parameters"] + bottom

    # Prose and other libraries' rows survive making it again; a run that is there is not trained again.
    other = [{"model": "lightgbm", "source": "python peers.py", "metrics": {"parity": {"auc": 0.99}}}]
    (folder / "results.json").write_text(json.dumps(record | {"external": other}))
    text = (folder / "README.md").read_text().replace("Say in two sentences", "Reads digits.")
    (folder / "README.md").write_text(text)
    monkeypatch.setattr("moe_mtl.cards.variants.run_recipe", lambda *_, **__: pytest.fail("trained again"))
    making.make("digits/mmoe", runs=runs, budget="ci", echo=lines.append)
    assert "Reads digits." in (folder / "README.md").read_text()
    assert check() == []
    assert load_record(folder)["external"] == other

    monkeypatch.setattr("moe_mtl.cards.variants.run_recipe", untrained)
    again = repeating.reproduce("mmoe-digits", echo=lines.append)
    assert len(again) == 4
    assert all(one.agrees for one in again)
    assert {(one.model, one.seed) for one in again} == {("mmoe", record["shipped_seed"])}
    nightly = repeating.reproduce(budget="nightly", echo=lines.append)
    assert len(nightly) == 3 * 3 * 4
    assert all(one.agrees for one in nightly)

    # On the same machine with the same packages the fourth decimal counts; elsewhere the row's own spread.
    seed = record["seeds"].index(record["shipped_seed"])
    auc = record["rows"][0]["metrics"]["parity"]["auc"]
    auc["values"][seed] += 0.0005
    record["rows"][0]["metrics"]["parity"]["auc"] = measure(auc["values"])
    (folder / "results.json").write_text(json.dumps(record))
    off = [one for one in repeating.reproduce("mmoe-digits", echo=lines.append) if not one.agrees]
    assert [(one.task, one.metric) for one in off] == [("parity", "auc")]
    assert f"expected {auc['values'][seed]:.4f}" in str(off[0])
    assert "OFF BY MORE THAN 0.0001" in str(off[0])
    for key, value in (("hardware", "a GPU"), ("packages", record["packages"] | {"torch": "1.0"})):
        (folder / "results.json").write_text(json.dumps(record | {key: value}))
        assert all(one.agrees for one in repeating.reproduce("mmoe-digits", echo=lines.append))
    auc["values"][seed] -= 0.02
    record["rows"][0]["metrics"]["parity"]["auc"] = measure(auc["values"])
    (folder / "results.json").write_text(json.dumps(record | {"hardware": "a GPU"}))
    (off,) = [one for one in repeating.reproduce("mmoe-digits", echo=lines.append) if not one.agrees]
    assert off.tolerance <= 0.01


def test_other_tools_are_taken_from_a_file(zoo, runs, tmp_path):
    lines = []
    folder = making.make("digits/mmoe", runs=runs, echo=lines.append)
    assert "external" not in load_record(folder)
    record = load_record(folder)
    tool = {"auc": 0.9, "std": None, "seconds": 1.0}
    found = {
        "bench": "trees",
        "command": "moe-mtl bench trees --model mmoe-digits",
        "data": record["data"],
        "models": {},
    }
    found["tasks"] = {"parity": {"LightGBM": tool}}
    path = tmp_path / "trees.json"
    path.write_text(json.dumps(found))
    making.make("digits/mmoe", runs=runs, external=path, echo=lines.append)
    (row,) = load_record(folder)["external"]
    assert row["metrics"] == {"parity": {"auc": 0.9}}
    assert "differences" not in row
    assert lines[-1] == "the other tools were not compared with these weights: moe-mtl bench trees --model mmoe-digits"
    assert check() == []

    difference = {"mean": 0.1, "ci_low": 0.05, "ci_high": 0.15}
    found["models"]["mmoe-digits"] = record["weights"]["sha256"]
    tool["differences"] = {"mmoe-digits": difference}
    path.write_text(json.dumps(found))
    making.make("digits/mmoe", runs=runs, external=path, echo=lines.append)
    assert load_record(folder)["external"][0]["differences"] == {"parity": {"auc": difference}}
    assert "these weights are ahead of LightGBM" in (folder / "README.md").read_text()
    assert check() == []


def test_the_experts_that_a_task_keeps_are_recorded():
    fields = {"features": [{"name": "x", "kind": "numeric"}], "tasks": [{"name": n, "kind": "binary"} for n in "ab"]}
    gates = model_class("dselect_k")
    model = gates(gates.config_class(**fields, num_experts=4, num_selected=2))
    with torch.no_grad():
        for gate in model.trunk.gates.values():
            gate.bits.fill_(0.0)
        model.trunk.gates["b"].bits.copy_(torch.tensor([[-9.0, 9.0], [9.0, 9.0]]))
    (undecided,), (settled,) = (variants._experts_of(model, task).values() for task in "ab")
    assert undecided == {"kept": [0, 1, 2, 3], "of": 4}
    assert settled["of"] == 4
    assert len(settled["kept"]) == 2
    dense = model_class("mmoe")
    assert variants._experts_of(dense(dense.config_class(**fields)), "a")["experts"]["kept"] == list(range(8))
    levels = model_class("ple")
    assert variants._experts_of(levels(levels.config_class(**fields)), "a") == {}


def test_a_full_disk_leaves_the_old_card(zoo, runs, monkeypatch):
    folder = making.make("digits/mmoe", runs=runs, echo=lambda _: None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        making.make("digits/mmoe", runs=runs, echo=lambda _: None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in zoo.iterdir()) == ["README.md", "TEMPLATE.md", "mmoe-digits"]


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("shared_bottom", "epochs: 1", "epochs: 2", "train.epochs of digits/mmoe, so that both have the same budget"),
        ("shared_bottom", "[digit, parity]", "[digit]", "expected the data and tasks"),
        (
            "shared_bottom",
            "type: shared_bottom\n  bottom_dims: [4]",
            "type: omoe",
            "expected a recipe of a shared_bottom",
        ),
        ("mmoe", "card: {name: mmoe-digits}", "", "expected card.name"),
        ("mmoe", "mmoe-digits}", "mmoe-digits, seeds: [0, 0, 1]}", "at least 3 card.seeds"),
    ],
)
def test_refused_before_any_training(zoo, monkeypatch, model, old, new, message):
    monkeypatch.setattr("moe_mtl.cards.variants.run_recipe", lambda *_, **__: pytest.fail("trained"))
    path = zoo.parent / "recipes" / "digits" / f"{model}.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((RecipeError, ValueError), match=message):
        making.make("digits/mmoe", echo=lambda _: None)
    assert not (zoo / "mmoe-digits").exists()


def test_the_best_seed_is_chosen_by_each_tasks_first_metric():
    runs = [
        {"a": {"auc": 0.8, "log_loss": 0.1}, "b": {"rmse": 2.0}},
        {"a": {"auc": 0.7, "log_loss": 0.9}, "b": {"rmse": 1.0}},
        {"a": {"auc": 0.9, "log_loss": 0.9}, "b": {"rmse": 3.0}},
    ]
    assert making.best_seed(runs) == 1


def test_recipes_are_named_as_the_library_names_them(zoo):
    path = zoo.parent / "recipes" / "digits" / "mmoe.yaml"
    assert variants.canonical(path) == variants.canonical("digits/mmoe") == "digits/mmoe"


def test_reproduce_refuses_what_it_does_not_know(zoo):
    with pytest.raises(ValueError, match="expected one of ci, nightly"):
        repeating.reproduce(budget="gpu")
    for budget in ("ci", "nightly"):
        with pytest.raises(ValueError, match="at least one record"):
            repeating.reproduce(budget=budget)
    with pytest.raises(hub.ModelNotFoundError, match="no card 'ple-digits'"):
        repeating.reproduce("ple-digits")
