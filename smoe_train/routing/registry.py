"""The table of routing policies; a file in this folder that registers one is found without further edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from smoe_train.registry import Registry
from smoe_train.routing.contract import RouterConfig
from smoe_train.routing.router import Router

R = TypeVar("R", bound=type[Router])


@dataclass(frozen=True)
class RouterEntry:
    """A policy: its class and the class of its options."""

    router: type[Router]
    config: type[RouterConfig]


ROUTERS: Registry[RouterEntry] = Registry("router")


def register_router(name: str, config: type[RouterConfig]) -> Callable[[R], R]:
    """Returns a class decorator that adds a policy under ``name``, the value of ``type`` in recipes."""

    def add(router: R) -> R:
        ROUTERS.register(name)(RouterEntry(router, config))
        return router

    return add
