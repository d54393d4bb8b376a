"""Files that are written from the code are current: the recipes' JSON Schema and the reference page."""

import importlib.util
import json
from pathlib import Path

import yaml

from smoe_train.recipe import recipe_folder
from smoe_train.routing import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "run scripts/write_recipe_schema.py"


def generator():
    spec = importlib.util.spec_from_file_location("write_recipe_schema", ROOT / "scripts" / "write_recipe_schema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_current():
    module = generator()
    assert json.loads(module.SCHEMA.read_text(encoding="utf-8")) == json.loads(module.schema_text()), REMEDY


def test_the_reference_page_is_current():
    module = generator()
    assert module.REFERENCE.read_text(encoding="utf-8") == module.reference_text(), REMEDY


def test_the_reference_page_has_every_option_of_every_router():
    page = generator().reference_text()
    for name in ROUTERS.names():
        section = page.partition(f"### `model.moe.router`, `type: {name}`")[2].partition("\n#")[0]
        options = set(ROUTERS.get(name).config.model_fields) - {"type"}
        assert sorted(option for option in options if f"| `{option}` |" not in section) == []


def test_recipes_state_version_and_purpose():
    for path in recipe_folder().rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert values["version"] == 1, path
        assert values["description"], path


def test_router_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in ROUTERS.names() if f"routers/{name}.md" not in navigation] == []
