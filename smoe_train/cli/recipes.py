"""``recipes`` and ``routers``: what is shipped, and what its options are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from smoe_train.config import read_values
from smoe_train.errors import LaunchError
from smoe_train.recipe import find_recipe, json_schema, load_recipe, recipe_folder, shipped_recipes

if TYPE_CHECKING:
    from smoe_train.routing import RouterEntry


def list_recipes(as_json: bool) -> None:
    """Prints each shipped recipe with its description."""
    rows = [(name, _description(path)) for name, path in shipped_recipes().items()]
    if as_json:
        print(json.dumps([{"name": name, "description": description} for name, description in rows], indent=1))
        return
    table = Table(Column("recipe", no_wrap=True), "description")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def show_recipe(name: str) -> None:
    """Prints a recipe's file.

    Raises:
        RecipeError: There is none, or it is no recipe.
    """
    path = find_recipe(name)
    read_values(path)
    print(path.read_text(encoding="utf-8"), end="")


def copy_recipe(name: str, target: Path) -> None:
    """Writes a recipe's file somewhere else, so that it still finds what it extends.

    Raises:
        LaunchError: The target exists or cannot be written.
    """
    source = find_recipe(name)
    load_recipe(str(source))  # a recipe that does not load is not worth copying
    text = source.read_text(encoding="utf-8")
    # The path to the schema is relative to the shipped file.
    text = "".join(line for line in text.splitlines(keepends=True) if "yaml-language-server" not in line)
    for node in reversed(_parents(yaml.compose(text))):
        beside = (source.parent / node.value).resolve()
        if beside.is_file():  # else it is a short name, found from anywhere
            text = text[: node.start_mark.index] + _from_anywhere(beside) + text[node.end_mark.index :]
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise LaunchError(f"{target}: exists; give another file name") from None
    except OSError as error:
        raise LaunchError(f"{target}: cannot be written: {error.strerror}") from error
    print(f"wrote {target}; train it with: smoe-train train {target}")


def _parents(root: yaml.Node | None) -> list[yaml.ScalarNode]:
    if not isinstance(root, yaml.MappingNode):
        return []
    found = [value for key, value in root.value if key.value == "extends"]
    nodes = [one for value in found for one in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return [node for node in nodes if isinstance(node, yaml.ScalarNode)]


def _from_anywhere(path: Path) -> str:
    """Returns what names a recipe from any folder, in YAML: its short name if it is shipped, else its whole path."""
    shipped = recipe_folder().resolve()
    if path.is_relative_to(shipped):
        return path.relative_to(shipped).with_suffix("").as_posix()
    return json.dumps(str(path), ensure_ascii=False)


def print_schema() -> None:
    """Prints the JSON Schema of recipes."""
    print(json.dumps(json_schema(), indent=1))


def list_routers(name: str, as_json: bool) -> None:
    """Prints a line for each routing policy, or the options of the one that is named.

    Raises:
        UnknownNameError: There is no such policy.
    """
    from smoe_train.routing import ROUTERS

    names = [name] if name else ROUTERS.names()
    entries = [_router(one, ROUTERS.get(one)) for one in names]
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    if not name:
        width = max(len(entry["type"]) for entry in entries) + 2
        for entry in entries:
            print(f"{entry['type']:{width}}{entry['summary']} [{entry['paper']}]")
        print("\nsmoe-train routers NAME shows a router's options")
        return
    (entry,) = entries
    table = Table("option", "default", "what it does", title=f"{name}: {entry['summary']}", min_width=60)
    table.caption = entry["paper"]
    for key, option in entry["options"].items():
        table.add_row(key, str(option["default"]), option["description"])
    Console().print(table)


def _router(name: str, entry: RouterEntry) -> dict[str, Any]:
    from smoe_train.routing import RouterConfig

    options = {
        key: {
            "default": {"type": field.default.type} if isinstance(field.default, RouterConfig) else field.default,
            "description": " ".join((field.description or "").split()),
        }
        for key, field in entry.config.model_fields.items()
        if key != "type"
    }
    return {"type": name, "summary": entry.router.summary, "paper": entry.router.paper, "options": options}


def _description(path: Path) -> str:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(values.get("description", "")) if isinstance(values, dict) else ""
