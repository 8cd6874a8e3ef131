"""What a saved model's folder says about where it came from; imports neither torch nor transformers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .recipe import Recipe, RecipeError, load_recipe

RECIPE, METRICS = "recipe.resolved.yaml", "metrics.json"  # of a run
DATA = "data.json"  # of a checkpoint: what the data say of themselves
RECORD = "results.json"  # of a card


def recipe_of(folder: Path, overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """The recipe a model was trained with: of a run its own, of a card the one that the record names.

    Raises:
        RecipeError: the folder has neither.
    """
    from ..files import read_json

    if (folder / RECIPE).is_file():
        return load_recipe(folder / RECIPE, overrides)
    if (folder / RECORD).is_file():
        return load_recipe(str(read_json(folder, RECORD).get("recipe")), overrides)
    raise RecipeError(f"{folder} does not say which rows it was trained on: it has neither {RECIPE} nor {RECORD}")


def batch_size_of(folder: Path) -> int:
    """Rows per forward pass in evaluation. Prediction uses the same: the last bit of an answer depends on it."""
    try:
        return recipe_of(folder).train.eval_batch_size
    except RecipeError:
        return Recipe().train.eval_batch_size


def plain(value: Any) -> Any:
    """JSON has no NaN: a metric that is not defined is null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
