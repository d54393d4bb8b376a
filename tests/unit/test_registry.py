"""A name -> object table whose failures list the choices."""

import sys

import pytest

from smoe_train.errors import SmoeError
from smoe_train.registry import Registry, UnknownNameError, suggest


def colours():
    registry = Registry("colour")
    registry.register("red")("ff0000")
    registry.register("green")("00ff00")
    return registry


def test_entries_come_back_sorted_by_name():
    registry = colours()
    assert registry.get("red") == "ff0000"
    assert registry.names() == ["green", "red"]
    assert list(registry.items()) == [("green", "00ff00"), ("red", "ff0000")]


def test_register_returns_what_it_decorates():
    assert Registry("thing").register("x")(int) is int


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match=r"colour 'red' is registered twice: ff0000 and other"):
        colours().register("red")("other")


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown colour 'gren'; did you mean 'green'\? allowed: green, red"):
        colours().get("gren")
    assert issubclass(UnknownNameError, SmoeError)


def test_nothing_is_suggested_that_is_far_away():
    assert suggest("zzz", ["green", "red"]) == "; allowed: green, red"
    assert suggest("zzz", []) == "; allowed: (none)"


def test_discover_imports_every_module_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "found_by_discover"
    package.mkdir()
    (package / "__init__.py").write_text("names = []\n")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"from found_by_discover import names\nnames.append({name!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    Registry("thing").discover("found_by_discover")
    assert sorted(sys.modules["found_by_discover"].names) == ["one", "two"]
    for name in ("found_by_discover", "found_by_discover.one", "found_by_discover.two"):
        monkeypatch.delitem(sys.modules, name)
