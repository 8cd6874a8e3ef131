import json

import pytest
import yaml

from moe_mtl.cards import build_card, build_index, page
from moe_mtl.cards.front_matter import front_matter
from moe_mtl.cards.record import load_record, record_problems
from moe_mtl.tasks import Task


def test_front_matter_is_what_the_hub_reads(card):
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard import metadata_load

    metadata = metadata_load(card / "README.md")
    assert metadata["license"] == "apache-2.0"
    data = ModelCardData(**metadata)
    found = {(r.dataset_type, r.metric_name, r.metric_type): r.metric_value for r in data.eval_results}
    # The shipped seed is the second one: its values, not the mean over the seeds.
    assert found == {
        ("digits", "parity auc", "roc_auc"): 0.92,
        ("digits", "parity log_loss", "log_loss"): 0.31,
        ("digits", "digit accuracy", "accuracy"): 0.96,
    }


def test_tables(card):
    text = (card / "README.md").read_text()
    for line in (
        "| **mmoe** | 10 | 1,000 | 0.9167 ± 0.0058 | 0.3100 ± 0.0100 | 0.9567 ± 0.0058 |",
        "| single-task (one model per task) | 10 | 1,000 | 0.9100 ± 0.0100 | 0.3100 ± 0.0100 | 0.9600 ± 0.0100 |",
        "| these weights (seed 1) |  |  | 0.9200 | 0.3100 | 0.9600 |",
        "| single-task (one model per task), parity auc | +0.0100 | +0.0050 to +0.0200 | better |",
        "| shared-bottom, digit accuracy | +0.0100 | -0.0050 to +0.0200 | no difference shown |",
        "- Against shared-bottom: not shown to differ on parity, digit.",
        "- Against single-task (one model per task): better on parity, digit.",
        "| parity | 6 | 60% | 600 | 60% |",
        "moe-mtl cards make recipes/digits/mmoe.yaml",
    ):
        assert line in text.split("\n"), line
    assert 'from_pretrained("mmoe-digits", tasks=["parity"])' in text


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("auc", 0.1, 0.2, "better"),
        ("auc", -0.2, -0.1, "worse"),
        ("auc", -0.1, 0.1, "no difference shown"),
        ("rmse", 0.1, 0.2, "worse"),
        ("log_loss", -0.2, -0.1, "better"),
    ],
)
def test_verdict(metric, low, high, expected):
    assert page.verdict({"metric": metric, "ci_low": low, "ci_high": high}) == expected


def test_prose_survives_and_numbers_follow_the_record(card):
    text = (card / "README.md").read_text().replace("# mmoe-digits", "# mmoe-digits\nIt tells odd from even.")
    (card / "README.md").write_text(text)
    record = load_record(card)
    record["wall_s"] = 99
    (card / "results.json").write_text(json.dumps(record))
    build_card(card)
    after = (card / "README.md").read_text()
    assert "It tells odd from even." in after
    assert "Made in 99 s" in after
    assert "Made in 12 s" not in after
    build_card(card)
    assert (card / "README.md").read_text() == after


def test_settings_that_differ_are_told(card):
    recipes = card.parents[1] / "recipes" / "digits"
    same = "The baselines follow `digits/shared_bottom`; settings that both recipes have are the same."
    assert same in page.results(load_record(card))
    (recipes / "mmoe.yaml").write_text(
        "model: {type: mmoe, dropout: 0.4, num_experts: 2}\ntrain: {learning_rate: 1e-2, early_stopping: {patience: 5}}"
    )
    (recipes / "shared_bottom.yaml").write_text("model: {type: shared_bottom, dropout: 0.2, bottom_dims: [8]}")
    told = (
        "The baselines follow `digits/shared_bottom`, whose settings differ: dropout 0.4 here, 0.2 there; "
        'learning_rate 0.01 here, 0.001 there; early_stopping {"metric": "loss", "patience": 5} here, none there. '
        "Only here: num_experts 2. Only there: bottom_dims [8]."
    )
    assert told in page.results(load_record(card))


def test_the_experts_that_a_task_keeps(card):
    record = load_record(card)
    assert "experts kept" not in page.results(record)
    record["single_task_cost"]["parity"]["experts"] = {"kept": [1, 6], "of": 8}
    record["single_task_cost"]["digit"]["experts"] = {"kept": list(range(8)), "of": 8}
    assert record_problems(record) == []
    text = page.results(record)
    assert "| one task alone | experts kept | parameters | of all |" in text
    assert "| parity | 2 of 8: 1, 6 | 6 | 60% |" in text
    assert "| digit | 8 of 8 | 6 |" in text


@pytest.mark.parametrize("text", ["none", "{0}", "{1}{0}", "{0}{1}{0}{1}"])
def test_pages_without_one_block_are_refused(text):
    with pytest.raises(ValueError, match="expected one block"):
        page.replace_block(text.format(*page.RESULTS), page.RESULTS, "x")


def test_the_zoo_table_links_from_where_it_stands(card):
    line = "0.9167 ± 0.0058, digit accuracy 0.9567 ± 0.0058 | 2 better |"
    for where, link in (
        (card.parent, "[mmoe-digits](mmoe-digits/README.md)"),
        (card.parents[1], "(model_cards/mmoe-digits/"),
    ):
        text = (where / "README.md").read_text()
        assert link in text
        assert line in text
    assert build_index() == [card.parent / "README.md", card.parents[1] / "README.md"]


def test_regression_cards_say_so(card):
    config = {"tasks": [Task("price", "regression").to_dict()]}
    record = load_record(card)
    record["rows"][0]["metrics"] = {"price": {"rmse": record["rows"][0]["metrics"]["parity"]["auc"]}}
    assert yaml.safe_load(front_matter(record, config))["pipeline_tag"] == "tabular-regression"
