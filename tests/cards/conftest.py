import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_mtl import hub
from moe_mtl.cards import page
from moe_mtl.cards.record import measure
from moe_mtl.training.recipe import load_recipe, recipe_sha256

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "TEMPLATE.md"
NAME = "mmoe-digits"


def make_record(folder: Path) -> dict:
    def row(model: str, role: str, recipe: str, shift: float) -> dict:
        return {
            "model": model,
            "role": role,
            "recipe": recipe,
            "recipe_sha256": recipe_sha256(load_recipe(recipe)),
            "parameters": 10,
            "multiply_adds": 1000,
            "metrics": {
                "parity": {"auc": measure([0.9 + shift, 0.91 + shift, 0.92]), "log_loss": measure([0.3, 0.31, 0.32])},
                "digit": {"accuracy": measure([0.95, 0.96, 0.97 - shift])},
            },
        }

    rows = [
        row("mmoe", "this", "digits/mmoe", 0.01),
        row("single_task", "baseline", "digits/shared_bottom", 0.0),
        row("shared_bottom", "baseline", "digits/shared_bottom", 0.005),
    ]
    weights = folder / "model.safetensors"
    return {
        "name": NAME,
        "model_type": "mmoe",
        "command": "moe-mtl cards make recipes/digits/mmoe.yaml",
        "recipe": "digits/mmoe",
        "recipe_sha256": rows[0]["recipe_sha256"],
        "data": {
            "name": "digits",
            "sha256": "0" * 64,
            "licence": "CC BY 4.0",
            "rows": {"train": 1000, "validation": 300, "test": 497},
        },
        "seeds": [0, 1, 2],
        "shipped_seed": 1,
        "weights": {"sha256": hub.file_sha256(weights), "bytes": weights.stat().st_size, "tensors": 2, "elements": 12},
        "rows": rows,
        "single_task_cost": {task: {"parameters": 6, "multiply_adds": 600} for task in ("parity", "digit")},
        "comparison": [
            {"baseline": b, "task": t, "metric": m, "mean": 0.01, "ci_low": low, "ci_high": 0.02}
            for b, low in (("single_task", 0.005), ("shared_bottom", -0.005))
            for t, m in (("parity", "auc"), ("digit", "accuracy"))
        ],
        "bootstrap": {"resamples": 1000, "confidence": 0.95},
        "wall_s": 12.3,
        "hardware": "2 cores",
        "packages": {"torch": "2.13.0"},
        "budget": "ci",
    }


@pytest.fixture
def card(tmp_path, monkeypatch) -> Path:
    """A whole checkout in miniature with one card that passes every check."""
    monkeypatch.setattr(hub, "data_folder", lambda name: tmp_path / name)
    (tmp_path / "recipes" / "digits").mkdir(parents=True)
    for model in ("mmoe", "shared_bottom"):
        (tmp_path / "recipes" / "digits" / f"{model}.yaml").write_text(f"model:\n  type: {model}\n")
    folder = tmp_path / "model_cards" / NAME
    folder.mkdir(parents=True)
    tasks = [{"name": "parity", "kind": "binary"}, {"name": "digit", "kind": "multiclass", "num_outputs": 10}]
    (folder / "config.json").write_text(json.dumps({"model_type": "mmoe", "tasks": tasks}))
    (folder / "preprocessor_config.json").write_text("{}")
    save_file({"a": torch.ones(10), "b": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "results.json").write_text(json.dumps(make_record(folder)))
    (folder / "recipe.resolved.yaml").write_text(load_recipe("digits/mmoe").to_yaml())
    hub.write_manifest(folder)
    (tmp_path / "model_cards" / "TEMPLATE.md").write_text(TEMPLATE.read_text().replace("<!-- write:", "<!-- wrote:"))
    (tmp_path / "model_cards" / "README.md").write_text(f"# Zoo\n\n{page.ZOO[0]}\n{page.ZOO[1]}\n")
    (tmp_path / "README.md").write_text(f"# Project\n\n{page.ZOO[0]}\n{page.ZOO[1]}\n")
    page.build_card(folder)
    page.build_index()
    return folder
