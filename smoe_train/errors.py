"""Every error that a user can cause: one tree, each with the exit code that the command line ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text with escapes (``\x1b``) for what a terminal would obey or hide, apart from some characters.

    Names of files, keys and labels come from strangers, and end in messages and logs.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


class SmoeError(Exception):
    """Base of all errors that smoe_train raises on purpose; printed without a traceback.

    The message says where, what, what is allowed and what to do next.
    """

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Attributes:
        where: File and line, or the override, that the value comes from.
        key: Dotted key path, e.g. ``model.moe.top_k``.
        message: What is wrong, what is allowed, what to do next.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        text = f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"
        return printable(text)  # a line break in a key would look like another problem


class RecipeError(SmoeError):
    """A recipe that cannot be run; holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 problem in the recipe" if count == 1 else f"{count} problems in the recipe"
        super().__init__("\n".join([f"{heading}:", *(f"  {problem}" for problem in self.problems)]))


class TopologyError(SmoeError):
    """Processes, expert-parallel groups and experts that do not fit together."""


class DataError(SmoeError):
    """A data set that is missing, damaged or not in the expected format."""


class CheckpointError(SmoeError):
    """A checkpoint that is missing, damaged or does not belong to this run."""


class LaunchError(SmoeError):
    """Worker processes that cannot be started as asked."""


class RunFailedError(SmoeError):
    """A run that failed while running, through no mistake in its inputs."""

    exit_code = 1


class RunStoppedError(SmoeError):
    """A run that was asked to stop, has written its checkpoint and can be resumed."""

    exit_code = 75


class CheckFailedError(SmoeError):
    """A check of the program itself that failed: training would go on, but not as it should."""

    exit_code = 3
