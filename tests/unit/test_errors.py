"""What a user can cause: one tree, exit codes as published, messages that hold every problem."""

import inspect

import pytest

import smoe_train.errors
from smoe_train.errors import DataError, Problem, RecipeError, RunFailedError, RunStoppedError, SmoeError, printable
from smoe_train.registry import UnknownNameError

EXIT_CODES = {
    "RecipeError": 2,
    "TopologyError": 2,
    "DataError": 2,
    "CheckpointError": 2,
    "LaunchError": 2,
    "RunFailedError": 1,
    "RunStoppedError": 75,
    "CheckFailedError": 3,
}


def test_every_error_has_its_published_exit_code():
    found = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(smoe_train.errors, inspect.isclass)
        if issubclass(kind, SmoeError) and kind is not SmoeError
    }
    assert found == EXIT_CODES
    assert UnknownNameError.exit_code == 2


@pytest.mark.parametrize("kind", [RunFailedError, RunStoppedError])
def test_errors_print_as_their_message(kind):
    assert str(kind("what to do next")) == "what to do next"


def test_a_recipe_error_lists_every_problem_with_its_place():
    problems = [Problem("a.yaml:3", "model.d_model", "is odd"), Problem("command line", "", "is no override")]
    assert str(RecipeError(problems)) == (
        "2 problems in the recipe:\n  a.yaml:3: model.d_model: is odd\n  command line: is no override"
    )
    assert str(RecipeError(problems[:1])).startswith("1 problem in the recipe:\n")
    assert RecipeError(problems).problems == tuple(problems)


def test_what_a_terminal_would_obey_is_shown_as_an_escape():
    assert printable("a\x1b[2J\u202eb\n") == "a\\x1b[2J\\u202eb\\n"
    assert str(DataError("\x1b: line 1\nline 2")) == "\\x1b: line 1\nline 2", "messages have lines of their own"
    problem = Problem("r.yaml:1", "a\nerror: all is well", "unknown key")
    assert "\n" not in str(problem), "a key cannot look like another line"
