"""The command line as a whole: help, version, and how errors end."""

import pytest
from support.command import smoe_train

import smoe_train as package
from smoe_train.cli import app

COMMANDS = ["train", "data", "evaluate", "generate", "validate", "report", "routers", "doctor", "demo", "recipes"]


def test_version():
    assert smoe_train("--version").out.strip() == package.__version__


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag):
    found = smoe_train(flag)
    assert found.code == 0
    assert all(f" {command} " in found.out for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [*([name] for name in COMMANDS), *(["recipes", n] for n in ("list", "show", "copy"))]
)
def test_every_command_has_help(command):
    found = smoe_train(*command, "--help")
    assert found.code == 0
    assert "Usage" in found.out


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["train"], ["train", "demo", "--nothing"], ["train", "demo", "--nproc", "0"], ["recipes", "x"]],
)
def test_wrong_arguments_end_with_2(arguments):
    assert smoe_train(*arguments).code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "demo", "seed=x"],
        ["validate", "nowhere.yaml"],
        ["train", "demo", "--nproc", "2", "--launcher", "nothing"],
        ["evaluate", "nowhere"],
        ["generate", "nowhere", "--prompt", "x"],
        ["recipes", "show", "nothing"],
    ],
)
def test_a_mistake_ends_with_one_message_and_2(arguments):
    found = smoe_train(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err


def test_an_interrupt_ends_with_130(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupted)
    assert smoe_train().code == 130
