"""Recipes of `mts-fast train`: options and a layout of data for known benchmarks, a TOML each."""

from mts_fast.pipeline.recipes.recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
