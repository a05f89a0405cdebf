"""The experiment as data: one typed schema, recipes as layers. No torch."""

from reproduce.recipe.load import load_recipe, shipped_recipes
from reproduce.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "shipped_recipes"]
