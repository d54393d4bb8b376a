"""Routing policies: arithmetic only; no process groups, no randomness of their own. One file a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field, TypeAdapter

from smoe_train.routing.contract import (
    EMPTY_SLOT,
    Assignment,
    Context,
    Draw,
    Merged,
    RouterConfig,
    RouterShape,
)
from smoe_train.routing.registry import ROUTERS, RouterEntry, register_router
from smoe_train.routing.router import Router

ROUTERS.discover(__name__)

if TYPE_CHECKING:
    AnyRouterConfig = RouterConfig
else:
    AnyRouterConfig = Annotated[
        Union[tuple(entry.config for _, entry in ROUTERS.items())],  # noqa: UP007 - built at run time
        Field(discriminator="type"),
    ]


def router_config(values: dict[str, object]) -> RouterConfig:
    """Returns the options object for a plain mapping with a ``type``, as a model configuration stores it."""
    config: RouterConfig = TypeAdapter(AnyRouterConfig).validate_python(values)
    return config


__all__ = [
    "EMPTY_SLOT",
    "ROUTERS",
    "AnyRouterConfig",
    "Assignment",
    "Context",
    "Draw",
    "Merged",
    "Router",
    "RouterConfig",
    "RouterEntry",
    "RouterShape",
    "register_router",
    "router_config",
]
