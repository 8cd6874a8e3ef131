"""What a saved model's folder says about where it came from, for the commands."""

from ..training.saved import RECIPE, batch_size_of, recipe_of

__all__ = ["RECIPE", "batch_size_of", "recipe_of"]
