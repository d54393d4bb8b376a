"""The recipe: what it holds, how its sections are checked against each other, how it is read."""

from smoe_train.recipe.load import check_recipe, find_recipe, load_recipe, recipe_folder, shipped_recipes
from smoe_train.recipe.pretrained import RECIPE, TOKENIZER, Pretrained, find_pretrained
from smoe_train.recipe.recipe import Recipe, flat, json_schema

__all__ = [
    "RECIPE",
    "TOKENIZER",
    "Pretrained",
    "Recipe",
    "check_recipe",
    "find_pretrained",
    "find_recipe",
    "flat",
    "json_schema",
    "load_recipe",
    "recipe_folder",
    "shipped_recipes",
]
