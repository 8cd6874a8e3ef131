"""The same words with different answers, and no letter that says which is asked for: only the adapter can know.

What ignores the task answers both questions alike, and is right on at most one of two answers that always differ. This
is what catches tasks that are lost between a recipe and an adapter.
"""

import pytest
import torch

from moe_mtl.training.recipe import load_recipe
from moe_mtl.training.run import run
from moe_mtl.tuners import METHODS

EDITS = ["rot13", "next-letter"]
TOLD = [str(name).lower() for config, name in METHODS.items() if config.adapter_class.by_task]


def mean_exact_match(name, tmp_path, steps):
    overrides = {
        "data.edits": str(EDITS),
        "data.tags": "false",
        "train.max_steps": str(steps),
        "train.eval_steps": "999",
    }
    recipe = load_recipe(f"word-edits/{name.replace('_', '-')}", overrides.items())
    torch.manual_seed(0)
    metrics = run(recipe, tmp_path / "run", progress=False).metrics["test"]
    assert list(metrics) == EDITS
    return sum(values["exact_match"] for values in metrics.values()) / len(EDITS)


@pytest.mark.parametrize("name", TOLD)
def test_a_method_that_is_told_the_task_answers_both(name, tmp_path):
    assert mean_exact_match(name, tmp_path, 120) > 0.6


def test_a_shared_lora_cannot(tmp_path):
    """By arithmetic; were a tag left in a prompt, it would."""
    assert mean_exact_match("lora", tmp_path, 120) <= 0.5
