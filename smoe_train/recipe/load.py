"""Reading a recipe: which file is meant, what it extends, what it inherits from pretrained weights, and the checks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from smoe_train.checkpoint.folders import CHECKPOINTS
from smoe_train.config import COMMAND_LINE, Layered, apply_overrides, build, merge, read_layers
from smoe_train.errors import Problem, RecipeError
from smoe_train.recipe.checks import cross_check, initial_checks
from smoe_train.recipe.pretrained import RECIPE, Pretrained, find_pretrained
from smoe_train.recipe.recipe import Recipe
from smoe_train.registry import suggest

# A recipe that extends another is another run: it has a name and a description of its own, or none.
NOT_INHERITED = frozenset({"name", "description"})


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), world_size: int | None = None, resolved: bool = False
) -> Recipe:
    """Reads, merges and checks a recipe.

    With ``initialise.path``, the model section of the weights found there and their tokenizer are the lowest layer. The
    recipe in a run's folder has taken them up already, and the path need not exist any more.

    Args:
        name_or_path: A file, or the short name of a shipped recipe (``demo``, ``enwik8/hyper_router``).
        overrides: ``key.path=value`` texts.
        world_size: Processes it shall run on; the topology is checked if given.
        resolved: Whether it is a run's own recipe in any case.

    Raises:
        RecipeError: Something is wrong; every mistake is listed.
        CheckpointError: There are no weights at ``initialise.path``.
    """
    path = find_recipe(name_or_path)
    layered = apply_overrides(read_layers(path, _resolve_parent, NOT_INHERITED), overrides)
    resolved = resolved or (path.name == RECIPE and (path.parent / CHECKPOINTS).is_dir())
    return check_recipe(layered, path.stem, world_size, None if resolved else _pretrained_of(layered))


def _pretrained_of(layered: Layered) -> Pretrained | None:
    section = layered.values.get("initialise")
    path, which = (section.get("path"), section.get("checkpoint", "best")) if isinstance(section, Mapping) else (0, 0)
    # What is no text is reported with the other mistakes.
    return find_pretrained(Path(path), which) if isinstance(path, str) and isinstance(which, str) else None


def check_recipe(
    layered: Layered, default_name: str, world_size: int | None = None, pretrained: Pretrained | None = None
) -> Recipe:
    """Turns merged values into a recipe; see `load_recipe`."""
    values = layered.values if "name" in layered.values else {**layered.values, "name": default_name}
    if pretrained is not None:
        initialise = values.get("initialise")
        new_routers = isinstance(initialise, Mapping) and initialise.get("router") == "new"
        tokenizer = {"type": "saved", "path": str(pretrained.tokenizer)}
        values = merge({"model": pretrained.inherited_model(new_routers), "tokenizer": tokenizer}, values)
    layered = Layered(values, layered.origins, layered.source)
    recipe, problems, dropped = build(Recipe, layered)
    if recipe is not None:
        found = cross_check(recipe, world_size)
        if pretrained is not None:
            found += initial_checks(recipe, pretrained.model)
        for key, message, involved in found:
            # A check that read a default in place of a wrong value would complain about what nobody wrote.
            if not any(_overlap(one, bad) for one in (key, *involved) for bad in dropped):
                overridden = any(layered.overridden(one) for one in (key, *involved))
                problems.append(Problem(COMMAND_LINE if overridden else layered.where(key), key, message))
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def recipe_folder() -> Path:
    """Returns the folder of shipped recipes: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes(to_extend: bool = False) -> dict[str, Path]:
    """Returns the shipped recipes by short name.

    Args:
        to_extend: Whether to name those that are only to be extended too, whose file names begin with an underscore.
    """
    folder = recipe_folder()
    paths = (path for path in sorted(folder.rglob("*.yaml")) if to_extend or not path.name.startswith("_"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def find_recipe(name_or_path: str, to_extend: bool = False) -> Path:
    """Returns the file of a recipe, given as a path or as a shipped recipe's short name.

    Args:
        name_or_path: What the user wrote.
        to_extend: Whether it may be one that is only to be extended.

    Raises:
        RecipeError: There is no such file and no such name.
    """
    path = Path(_expanded(name_or_path))
    exists = _is_file(path)
    if path.suffix in (".yaml", ".yml") or exists:
        if exists:
            return path
        raise RecipeError([Problem(name_or_path, "", "there is no such file")])
    recipes = shipped_recipes(to_extend)
    if name_or_path not in recipes:
        hint = suggest(name_or_path, sorted(recipes))
        raise RecipeError([Problem(name_or_path, "", f"no file and no shipped recipe of this name{hint}")])
    return recipes[name_or_path]


def _resolve_parent(name: str, folder: Path) -> Path:
    beside = folder / _expanded(name)
    if beside.suffix in (".yaml", ".yml"):
        if not _is_file(beside):
            raise RecipeError([Problem(name, "", f"there is no such file in {folder}")])
        return beside.resolve()
    shipped = recipe_folder() / f"{name}.yaml"
    return shipped if _is_file(shipped) else find_recipe(name, to_extend=True)


def _expanded(name: str) -> str:
    return name if "\0" in name else os.path.expanduser(name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False
