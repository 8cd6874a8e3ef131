"""Cards of a language model and of an adapter on it, made from the first line to the last on a few words."""

import json

import numpy as np
import pytest

from moe_mtl import hub, load_adapter
from moe_mtl.cards import check, making, repeating
from moe_mtl.cards.curves import CURVES, draw, means
from moe_mtl.cards.page import ZOO, build_card
from moe_mtl.cards.record import load_record, record_problems
from moe_mtl.data import word_edits
from moe_mtl.data.text import TextSplits
from moe_mtl.training.recipe import RecipeError
from moe_mtl.training.run import evaluate

EDITS = ["reverse", "rot13"]
TRAIN = "train: {max_steps: STEPS, batch_size: 8, eval_batch_size: 64, eval_steps: 2, schedule: linear}\n"
DATA = f"data: {{name: word-edits, edits: [{', '.join(EDITS)}]}}\n"
SIZES = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2"


def recipe(model, steps=4, card=None):
    return (
        DATA
        + f"model: {{{model}}}\n"
        + TRAIN.replace("STEPS", str(steps))
        + (f"card: {{name: {card}}}\n" if card else "")
    )


def adapter(fields):
    return f"from: tiny-words, adapter: {{{fields}}}"


RECIPES = {
    "base": recipe(f"type: llama, {SIZES}", card="tiny-words"),
    "mtl-lora": recipe(adapter("method: mtl_lora, r: 3, alpha: 6"), card="mtl-lora-words"),
    "smora": recipe(adapter("method: smora, r: 5, num_selected: 3"), card="smora-words"),
    "lora": recipe(adapter("method: lora, r: 7")),
    "lora-active": recipe(adapter("method: lora, r: 3")),
    "lora-each": recipe(adapter("method: lora, r: 3"), steps=2),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    load = word_edits.load

    def few(options):
        splits = load(options)
        parts = {name: list(part)[: 10 * len(splits.tasks)] for name, part in splits.parts().items()}
        return TextSplits(**parts, tasks=splits.tasks, info=splits.info)

    (folder / "recipes" / "words").mkdir(parents=True)
    for name, text in RECIPES.items():
        (folder / "recipes" / "words" / f"{name}.yaml").write_text(text)
    (folder / "model_cards").mkdir()
    for name in ("TEMPLATE.md", "TEMPLATE-model.md", "TEMPLATE-adapter.md"):
        text = (hub.zoo_folder() / name).read_text().replace("<!-- write:", "<!-- wrote:")
        (folder / "model_cards" / name).write_text(text)
    (folder / "model_cards" / "README.md").write_text("\n".join(ZOO))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_edits, "load", few)
        patch.setattr(making, "RESAMPLES", 20)
        patch.setattr(hub, "data_folder", lambda name: folder / name)
        for name in ("base", "mtl-lora", "smora"):
            making.make(f"words/{name}", runs=folder / "runs", budget="ci", echo=lambda line: None)
        yield folder / "model_cards"


def test_made_cards_have_no_problem(zoo):
    assert sorted(hub.zoo()) == ["mtl-lora-words", "smora-words", "tiny-words"]
    assert check() == []
    assert [p.name for p in (zoo / "tiny-words").iterdir() if p.suffix == ".safetensors"] == ["model.safetensors"]
    adapter_files = {p.name for p in (zoo / "mtl-lora-words").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", CURVES} <= adapter_files


def test_an_adapter_is_compared_with_three_loras(zoo):
    record = load_record(zoo / "mtl-lora-words")
    rows = {row["model"]: row for row in record["rows"]}
    assert list(rows) == ["mtl_lora", "lora", "lora-active", "lora-each"]
    own = load_adapter("mtl-lora-words", is_trainable=True)
    assert rows["mtl_lora"]["parameters"] == sum(p.numel() for p in own.parameters() if p.requires_grad)
    assert abs(rows["lora"]["parameters"] / rows["mtl_lora"]["parameters"] - 1) < 0.1
    assert rows["lora-each"]["parameters"] == len(EDITS) * rows["lora-active"]["parameters"]
    # Of one task alone: a LoRA of rank 3.
    assert record["single_task_cost"]["reverse"]["parameters"] == rows["lora-active"]["parameters"]
    assert len(record["comparison"]) == 3 * len(EDITS)
    for entry in record["comparison"]:
        means_of = [rows[m]["metrics"][entry["task"]]["exact_match"]["mean"] for m in ("mtl_lora", entry["baseline"])]
        assert entry["mean"] == pytest.approx(means_of[0] - means_of[1])
    cost = load_record(zoo / "smora-words")["single_task_cost"]["reverse"]["parameters"]
    assert cost == load_record(zoo / "smora-words")["rows"][0]["parameters"], "not to be taken apart"


def test_the_shipped_weights_are_those_that_were_measured(zoo):
    for name in hub.zoo():
        record = load_record(zoo / name)
        shipped = record["seeds"].index(record["shipped_seed"])
        for task, metrics in evaluate(name).metrics.items():
            for metric, value in metrics.items():
                assert value == pytest.approx(record["rows"][0]["metrics"][task][metric]["values"][shipped], abs=1e-5)


def test_curves_are_the_means_of_the_seeds_and_the_picture_shows_them(zoo):
    record = load_record(zoo / "mtl-lora-words")
    assert set(record["curves"]) == {"mtl_lora", "lora", "lora-active"}, "lora-each has other steps"
    curve = record["curves"]["mtl_lora"]
    assert curve["step"] == [2, 4]
    assert np.shape(curve["exact_match"]) == (3, 2)
    np.testing.assert_allclose(means(curve), np.mean(curve["exact_match"], axis=0))
    svg = (zoo / "mtl-lora-words" / CURVES).read_text()
    assert svg == draw(record)
    assert svg.count("<polyline") == 3
    page = (zoo / "mtl-lora-words" / "README.md").read_text()
    assert f"({CURVES})" in page
    assert "mean exact match after steps" in page
    assert record_problems(record | {"curves": {"mtl_lora": {"step": [1], "exact_match": [[0.1, 0.2]]}}})


def test_a_changed_picture_or_page_is_a_problem(zoo):
    picture = zoo / "mtl-lora-words" / CURVES
    before = picture.read_text()
    picture.write_text(before.replace("<svg", "<svg "))
    assert any(CURVES in problem for problem in check("mtl-lora-words"))
    build_card(zoo / "mtl-lora-words")
    assert picture.read_text() == before
    assert check("mtl-lora-words") == []


def test_a_record_of_text_is_reproduced(zoo):
    found = repeating.reproduce("mtl-lora-words", echo=lambda line: None, progress=False)
    assert len(found) == 2 * len(EDITS)
    assert all(one.agrees for one in found)


def test_a_card_is_made_again_in_its_place(zoo):
    before = {path.name: path.read_bytes() for path in (zoo / "smora-words").iterdir()}
    making.make("words/smora", runs=zoo.parent / "runs", budget="ci", echo=lambda line: None)
    assert {path.name: path.read_bytes() for path in (zoo / "smora-words").iterdir()} == before


def test_a_baseline_with_another_budget_or_size_is_refused(zoo):
    path = zoo.parent / "recipes" / "words" / "lora.yaml"
    before = path.read_text()
    for text, message in (
        (before.replace("max_steps: 4", "max_steps: 5"), "max_steps 4"),
        (before.replace("r: 7", "r: 9"), "many trained"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            making.make("words/mtl-lora", runs=zoo.parent / "runs", echo=lambda line: None)
    path.write_text(before)


def test_the_table_of_the_zoo_tells_what_text_models_do(zoo):
    text = (zoo / "README.md").read_text()
    assert "[mtl-lora-words](mtl-lora-words/README.md)" in text
    assert json.loads((zoo / "tiny-words" / "results.json").read_text())["comparison"] == []
