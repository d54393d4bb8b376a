"""``recipes`` and ``routers``."""

import json

import pytest
from typer.testing import CliRunner

from smoe_train.cli.app import app
from smoe_train.errors import LaunchError, RecipeError
from smoe_train.recipe import find_recipe, json_schema, load_recipe, shipped_recipes
from smoe_train.registry import UnknownNameError
from smoe_train.routing import ROUTERS


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list():
    listed = json.loads(call("recipes", "list", "--json"))
    assert [entry["name"] for entry in listed] == list(shipped_recipes())
    for entry in listed:
        assert entry["description"] == load_recipe(entry["name"]).description
    table = call("recipes", "list")
    assert all(name in table for name in shipped_recipes())


def test_show_prints_the_file():
    assert call("recipes", "show", "demo") == find_recipe("demo").read_text()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_is_the_same_recipe_anywhere(name, tmp_path):
    target = tmp_path / f"{name.rpartition('/')[2]}.yaml"
    assert str(target) in call("recipes", "copy", name, target)
    assert load_recipe(str(target)) == load_recipe(name)


def test_a_copy_of_a_recipe_of_ones_own_finds_what_it_extends(tmp_path):
    (tmp_path / "mine").mkdir()
    base, mine = tmp_path / "mine" / "base: 1.yaml", tmp_path / "mine" / "r.yaml"
    base.write_text("version: 1\nseed: 5\n")
    for extends in ("'base: 1.yaml'", "[glue/rte, 'base: 1.yaml', routers/_random]", "\n  - demo\n  - 'base: 1.yaml'"):
        mine.write_text(f"# yaml-language-server: $schema=x.json\nextends: {extends}\nname: mine # and more\n")
        target = tmp_path / "copy.yaml"
        target.unlink(missing_ok=True)
        call("recipes", "copy", mine, target)
        assert load_recipe(str(target)) == load_recipe(str(mine)), extends
        assert "name: mine # and more" in target.read_text()


def test_a_copy_replaces_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(LaunchError, match=r"r\.yaml: exists; give another file name"):
        call("recipes", "copy", "demo", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    with pytest.raises(LaunchError, match="cannot be written: No such file or directory"):
        call("recipes", "copy", "demo", tmp_path / "no" / "r.yaml")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        call("recipes", "show", "dmeo")


def test_schema():
    assert json.loads(call("recipes", "schema")) == json.loads(json.dumps(json_schema()))


def test_routers():
    listed = {entry["type"]: entry for entry in json.loads(call("routers", "--json"))}
    assert list(listed) == ROUTERS.names()
    assert listed["hyper_router"]["options"]["hyper_hidden"]["default"] == 256
    for entry in listed.values():
        assert entry["summary"]
        assert "arXiv" in entry["paper"]
        assert all(option["description"] for option in entry["options"].values())
    assert listed["sim_smoe"]["options"]["base"]["default"] == {"type": "top_k"}


def test_routers_have_a_line_each_and_one_shows_its_options():
    table = call("routers")
    assert [line.split()[0] for line in table.splitlines()[: len(ROUTERS.names())]] == ROUTERS.names()
    assert "hyper_hidden" not in table
    assert "hyper_hidden" in call("routers", "hyper_router")
    assert json.loads(call("routers", "x_moe", "--json"))[0]["type"] == "x_moe"
    with pytest.raises(UnknownNameError, match="did you mean 'top_k'"):
        call("routers", "topk")
