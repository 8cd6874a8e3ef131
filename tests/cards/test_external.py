import json
import sys
import types

import numpy as np
import pytest

from moe_mtl.bench import trees
from moe_mtl.cards import check, external, page
from moe_mtl.cards.bootstrap import Difference
from moe_mtl.cards.record import load_record
from moe_mtl.cli import main
from moe_mtl.hub import zoo_folder

SOURCE = "moe-mtl bench trees --path rows.gz --model mmoe-digits"


@pytest.fixture
def found(card, tmp_path):
    """A result of `moe-mtl bench trees` that compared the card's weights, on one of its two tasks."""
    record = load_record(card)
    difference = {"mean": -0.0006, "ci_low": -0.0021, "ci_high": 0.0009}
    tools = {
        "logistic regression": {"auc": 0.85, "std": None, "seconds": 1.0, "differences": {"mmoe-digits": difference}},
        "LightGBM": {"auc": 0.9206, "std": 1e-5, "seconds": 4.0, "differences": {"mmoe-digits": difference}},
    }
    return {
        "bench": "trees",
        "command": SOURCE,
        "data": record["data"],
        "models": {"mmoe-digits": record["weights"]["sha256"]},
        "tasks": {"parity": tools, "other": tools},
        "scores": {"parity": {"mmoe-digits": 0.92}},
    }


def written(tmp_path, content):
    path = tmp_path / "trees.json"
    path.write_text(json.dumps(content))
    return path


def test_a_finished_card_takes_the_trees_and_says_who_is_ahead(card, found, tmp_path, capsys):
    weights = (card / "model.safetensors").read_bytes()
    path = written(tmp_path, found)
    assert main(["cards", "build", "mmoe-digits", "--external", str(path)]) == 0
    assert check() == []
    assert (card / "model.safetensors").read_bytes() == weights
    text = (card / "README.md").read_text()
    assert f"| LightGBM, one model per task | 0.9206 | `{SOURCE}` |" in text
    assert (
        "- parity auc: LightGBM, one model per task, is ahead of these weights by 0.0006 "
        "(these weights minus it -0.0021 to +0.0009, no difference shown).\n"
    ) in text
    assert "other" not in load_record(card)["external"][0]["metrics"]
    assert main(["cards", "build", "--external", str(path)]) == 2
    assert "expected the names of the cards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gap", "told"),
    [
        (
            (-0.02, -0.03, -0.01),
            "LightGBM, one model per task, is ahead of these weights by 0.0200 (these weights minus",
        ),
        ((0.02, 0.01, 0.03), "these weights are ahead of LightGBM, one model per task, by 0.0200 (these weights minus"),
        ((0.00004, -0.1, 0.1), "LightGBM, one model per task, and these weights are level (these weights minus"),
        (
            None,
            "LightGBM, one model per task, is ahead of the mean over the seeds by 0.0039 (not compared row by row).",
        ),
    ],
)
def test_who_is_ahead(card, found, tmp_path, gap, told):
    record = load_record(card)
    if gap is None:
        found["models"] = {}
    else:
        difference = dict(zip(("mean", "ci_low", "ci_high"), gap, strict=True))
        found["tasks"]["parity"]["LightGBM"]["differences"]["mmoe-digits"] = difference
    record["external"] = external.external_rows(written(tmp_path, found), record)
    assert told in page.results(record)


def test_lower_is_better_of_a_loss():
    row = {"role": "this", "metrics": {"t": {"rmse": {"mean": 2.0}}}}
    peers = [
        {"model": name, "source": "x", "metrics": {"t": {"rmse": value}}} for name, value in (("a", 1.0), ("b", 3))
    ]
    assert page._who_is_ahead({"rows": [row], "external": peers}, "t", "rmse").startswith("t rmse: a, is ahead of")


def test_refusals(card, found, tmp_path):
    before = (card / "results.json").read_bytes()
    for change, message in (
        ({"models": {"mmoe-digits": "0" * 64}}, "does not compare the weights of mmoe-digits as they are"),
        ({"models": {}}, "run moe-mtl bench trees --model mmoe-digits again"),
        ({"data": found["data"] | {"sha256": "1" * 64}}, "measured on other rows"),
        ({"data": found["data"] | {"rows": {"test": 1}}}, "measured on other rows"),
        ({"tasks": {"other": {}}}, "expected a task of mmoe-digits, found other"),
        ({"tasks": {"parity": {"LightGBM": {}}}}, "expected a result of moe-mtl bench trees"),
        ({"bench": "tabular"}, "found one of 'tabular'"),
    ):
        with pytest.raises(ValueError, match=message):
            external.attach(card, written(tmp_path, found | change))
    assert (card / "results.json").read_bytes() == before


def test_rows_of_an_earlier_record_stay_and_differences_of_other_weights_go(card, found, tmp_path):
    record = load_record(card)
    earlier = record | {"external": external.external_rows(written(tmp_path, found), record)}
    assert external.kept_rows(earlier, record) == earlier["external"]
    other = record | {"weights": record["weights"] | {"sha256": "1" * 64}}
    assert [sorted(row) for row in external.kept_rows(earlier, other)] == [["metrics", "model", "source"]] * 2
    assert external.kept_rows(earlier, record | {"data": record["data"] | {"sha256": "1" * 64}}) == []


class Booster:
    """Stands for LightGBM: scores by one column."""

    best_score = {"valid_0": {"auc": 0.7}}

    def predict(self, columns):
        return columns[:, 36]


def test_what_the_trees_write_is_what_a_card_takes(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(
        Dataset=lambda *_, **__: None, early_stopping=lambda *_, **__: None, train=lambda *_, **__: Booster()
    )
    monkeypatch.setitem(sys.modules, "lightgbm", fake)
    monkeypatch.setattr(trees, "PENALTIES", (1e-4,))
    monkeypatch.setattr(trees, "paired_bootstrap", lambda *_: Difference(0.01, -0.01, 0.02))
    options = trees.Options(
        data="digits", model=("mmoe-digits", "ple-digits"), output=str(tmp_path / "new"), seeds=(0, 1)
    )
    result = trees.main(options)
    assert json.loads((tmp_path / "new" / "trees.json").read_text()) == result
    assert result["command"] == "moe-mtl bench trees --model mmoe-digits ple-digits --data digits --seeds 0 1"
    assert list(result["tasks"]) == ["parity", "at_least_5"]
    for name in ("mmoe-digits", "ple-digits"):
        record = load_record(zoo_folder() / name)
        rows = external.external_rows(tmp_path / "new" / "trees.json", record)
        assert external.compared({"external": rows})
        assert [row["model"] for row in rows] == ["logistic regression" + external.NAME, "LightGBM" + external.NAME]
        shipped = record["seeds"].index(record["shipped_seed"])
        for task in result["tasks"]:
            expected = record["rows"][0]["metrics"][task]["auc"]["values"][shipped]
            assert result["scores"][task][name] == pytest.approx(expected, abs=1e-3)  # ties of rounded probabilities
            assert np.isfinite(rows[0]["metrics"][task]["auc"])
    with pytest.raises(ValueError, match="each once"):
        trees.Options(model=("a", "x/a"))
