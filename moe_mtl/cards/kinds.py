"""Which functions make the card of a recipe: those for tables, text or pictures."""

from typing import Any

from ..data import is_images, is_text
from ..training.recipe import Recipe
from . import image_variants, text_variants, variants


def kind_of(recipe: Recipe) -> Any:
    """A module with the functions that `variants` has."""
    name = recipe.data.name
    return text_variants if is_text(name) else image_variants if is_images(name) else variants
