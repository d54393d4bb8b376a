"""Every routing policy has a recipe, a source and a page; every recipe loads for the processes it is meant for."""

import re
from pathlib import Path

import pytest
import yaml

import smoe_train
from smoe_train.recipe import load_recipe, recipe_folder, shipped_recipes
from smoe_train.routing import ROUTERS

ROOT = Path(smoe_train.__file__).parent.parent
FILES = sorted(recipe_folder().rglob("*.yaml"))


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_router_has_a_smoke_recipe(router):
    recipe = load_recipe(f"smoke/{router}", world_size=1)
    assert recipe.model.moe.router.type == router
    assert recipe.model.moe_layers()
    assert recipe.training.max_steps * recipe.training.global_batch_size * recipe.training.sequence_length < 10**6


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_router_says_what_it_is_and_where_it_comes_from(router):
    kind = ROUTERS.get(router).router
    assert re.search(r"arXiv \d{4}\.\d{5}", kind.paper)
    assert 10 < len(kind.summary) < 120
    assert "\n" not in kind.summary
    assert kind.loss_names is not None


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_router_has_a_page_that_names_all_options(router):
    page = ROOT / "docs" / "routers" / f"{router}.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    options = set(ROUTERS.get(router).config.model_fields) - {"type"}
    assert sorted(option for option in options if f"`{option}" not in text) == []


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_loads_for_its_processes(name):
    recipe = load_recipe(name)
    load_recipe(name, [], recipe.parallel.expert_parallel_size)


def test_what_is_only_to_be_extended_is_extended_by_a_recipe_or_is_a_policy():
    """So that a test loads each of those files: the policies, over every task, those of test_tasks.py."""
    extended = set()
    for path in FILES:
        parents = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends", [])
        names = [parents] if isinstance(parents, str) else parents
        extended |= {(path.parent / name).resolve() for name in names}
    policies = {(recipe_folder() / "routers" / f"_{name}.yaml").resolve() for name in ROUTERS.names()}
    assert {path.resolve() for path in FILES if path.name.startswith("_")} == extended | policies


def test_runs_of_different_recipes_do_not_share_a_folder():
    names = [load_recipe(name).name for name in shipped_recipes()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(recipe_folder()).as_posix())
def test_editors_find_the_schema_from_every_recipe(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match, "the first line tells editors where the schema is"
    assert (path.parent / match[1]).resolve() == recipe_folder() / "recipe.schema.json"
