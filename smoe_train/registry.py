"""A name -> object table whose failures list the choices, and discovery of the modules that fill it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from smoe_train.errors import SmoeError

T = TypeVar("T")


class UnknownNameError(SmoeError):
    """A name that is in no registry."""


class Registry(Generic[T]):
    """Objects by name.

    Args:
        kind: What is registered, in the singular, for messages ("router", "data source").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that adds an object under ``name``.

        Raises:
            ValueError: The name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {entry}")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Returns the object called ``name``.

        Raises:
            UnknownNameError: There is none; the message lists the choices.
        """
        if name not in self._entries:
            raise UnknownNameError(f"unknown {self.kind} {name!r}{suggest(name, self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yields (name, object), sorted by name."""
        return ((name, self._entries[name]) for name in self.names())

    def discover(self, package: str) -> None:
        """Imports every module of ``package``, so that each registers what it defines: a new file is enough."""
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def suggest(name: str, choices: list[str]) -> str:
    """Returns the end of a message about an unknown name: the nearest choice, then all choices."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} allowed: {', '.join(choices) or '(none)'}"
