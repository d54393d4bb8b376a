"""The recipe: what it holds, how its sections are checked against each other, how it is read."""

from smoe_train.recipe.checks import initial_checks
from smoe_train.recipe.load import check_recipe, find_recipe, load_recipe, recipe_folder, shipped_recipes
from smoe_train.recipe.pretrained import RECIPE, TOKENIZER, Pretrained, find_pretrained, tokenizer_of
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
    "initial_checks",
    "json_schema",
    "load_recipe",
    "recipe_folder",
    "shipped_recipes",
    "tokenizer_of",
]
