import contextlib
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from moe_mtl import hub
from moe_mtl.cards import build_card, check
from moe_mtl.cards.checks import decimals_in_prose
from moe_mtl.cards.page import RESULTS


def test_a_good_card_passes(card):
    assert check() == []
    assert check("mmoe-digits") == check(card) == check([card, "mmoe-digits"]) == []


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def alter_record(card, key, value):
    record = json.loads((card / "results.json").read_text())
    record[key] = value
    (card / "results.json").write_text(json.dumps(record))
    with contextlib.suppress(ValueError):
        build_card(card)  # so that the page is not what fails


def other_weights(card):
    save_file({"a": torch.ones(10), "b": torch.ones(2)}, card / "model.safetensors")
    hub.write_manifest(card)


def flip_a_bit(card):
    whole = (card / "model.safetensors").read_bytes()
    (card / "model.safetensors").write_bytes(whole[:-1] + b"\x01")


ALTERATIONS = {
    "a number in the table": (lambda c: edit(c / "README.md", "0.9567", "0.9967"), "README.md is not what"),
    "a number in the front matter": (lambda c: edit(c / "README.md", "value: 0.92", "value: 0.99"), "README.md is not"),
    "a broken front matter": (lambda c: edit(c / "README.md", "---\n", "--\n"), "README.md"),
    "a number in prose": (
        lambda c: edit(c / "README.md", "## Where", "0.99\n## Where"),
        "line .* without a record",
    ),
    "prose never written": (lambda c: edit(c / "README.md", "<!-- wrote:", "<!-- write:"), "prose is missing at"),
    "no block": (lambda c: edit(c / "README.md", RESULTS[1], ""), "expected one block"),
    "a value in the record": (lambda c: edit(c / "results.json", "0.95,", "0.99,"), "mean or std"),
    "a recipe": (
        lambda c: (c.parents[1] / "recipes/digits/mmoe.yaml").write_text("model: {type: ple}"),
        "mmoe changed",
    ),
    "a baseline's recipe": (
        lambda c: (c.parents[1] / "recipes/digits/shared_bottom.yaml").write_text("model: {type: omoe}"),
        "shared_bottom changed",
    ),
    "the resolved recipe": (
        lambda c: edit(c / "recipe.resolved.yaml", "batch_size: 512", "batch_size: 64"),
        "recipe.resolved.yaml is not the recipe",
    ),
    "a path": (
        lambda c: edit(c / "recipe.resolved.yaml", "path: null", "path: /home/x"),
        "no data.path, found '/home/x'",
    ),
    "no recipe": (lambda c: (c.parents[1] / "recipes/digits/mmoe.yaml").unlink(), "no recipe"),
    "other weights": (other_weights, "model.safetensors is not that of results.json: expected sha256"),
    "a flipped bit": (flip_a_bit, "damaged"),
    "truncated weights": (lambda c: (c / "model.safetensors").write_bytes(b"12345678"), "truncated"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "expected the file model.safetensors"),
    "no processor": (lambda c: (c / "preprocessor_config.json").unlink(), "expected the file preprocessor_config"),
    "a pickle": (lambda c: (c / "optimizer.pt").write_bytes(b""), "pickles are never shipped"),
    "a stray file": (lambda c: (c / "notes.txt").write_text("x"), "notes.txt: no file of a card"),
    "too large": (lambda c: (c / "manifest.json").write_text(" " * 2_000_000), "expected at most 2,000,000 bytes"),
    "another name": (lambda c: alter_record(c, "name", "mmoe-digit"), "expected the name mmoe-digits"),
    "another task": (
        lambda c: edit(c / "config.json", "parity", "evenness"),
        r"config.json has the tasks \['evenness', 'digit'\]",
    ),
    "another model type": (lambda c: edit(c / "config.json", "mmoe", "ple"), "config.json of a ple"),
    "code": (lambda c: edit(c / "config.json", "{", '{"auto_map": {}, '), "auto_map"),
    "two seeds": (lambda c: alter_record(c, "seeds", [0, 1]), "at least 3"),
    "no licence": (lambda c: alter_record(c, "data", {"name": "d", "sha256": "0", "rows": {}}), "licence: missing"),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_each_alteration_fails(card, what):
    alter, message = ALTERATIONS[what]
    alter(card)
    problems = check(card)
    assert any(re.search(message, problem) for problem in problems), problems
    assert all(problem.startswith("mmoe-digits: ") for problem in problems)


def test_the_zoo_table_is_checked(card):
    edit(card.parent / "README.md", "0.9567", "0.9968")
    assert check() == ["model_cards/README.md: the table of the zoo is stale; run moe-mtl cards build"]
    assert check(card) == []
    for page in (card.parent, card.parents[1]):
        (page / "README.md").write_text("no table")
    assert "expected a table between" in check()[0]


def test_an_empty_zoo_is_a_problem(card, monkeypatch):
    monkeypatch.setattr(hub, "data_folder", lambda name: card / "nowhere")
    assert "expected cards, found none" in check()[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("AUC is 0.95.", ["line 1: 0.95"]),
        ("about .5", ["line 1: .5"]),
        ("one\n\n-0.3 and 12 %", ["line 3: 0.3", "line 3: 12 %"]),
        ("```\n0.5\n```\n0.6", ["line 4: 0.6"]),
        (f"---\nvalue: 0.1\n---\n{RESULTS[0]}\n0.2\n{RESULTS[1]}\n0.3", ["line 7: 0.3"]),
        ("`lr=0.1`, CC BY 4.0, Apache-2.0, arXiv:1801.00001, https://x.org/1.5, 1,227 rows, v1.2, 3 seeds.", []),
    ],
)
def test_decimals_in_prose(text, found):
    assert decimals_in_prose(text) == found


def test_checking_needs_no_torch(card):
    code = "import sys; from moe_mtl.cards import check; check(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, card]).returncode == 0
