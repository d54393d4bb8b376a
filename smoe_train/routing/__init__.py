"""Routing policies: arithmetic only; no process groups, no randomness of their own. One file a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, TypeAdapter

from smoe_train.routing.contract import (
    EMPTY_SLOT,
    Assignment,
    Contest,
    Context,
    Draw,
    Merged,
    Outcome,
    RouterConfig,
    RouterPlan,
    RouterShape,
    StepTotals,
)
from smoe_train.routing.registry import ROUTERS, RouterEntry, register_router
from smoe_train.routing.router import Router
from smoe_train.routing.softmax_top_k import SoftmaxTopKRouter

ROUTERS.discover(__name__)


def _union(configs: list[type[RouterConfig]]) -> Any:
    return Annotated[Union[tuple(configs)], Field(discriminator="type")]  # noqa: UP007 - built at run time


if TYPE_CHECKING:
    AnyRouterConfig = RouterConfig
else:
    # A policy over a base names the union of its possible bases by one of these; it exists once all are found.
    _plain = [entry for _, entry in ROUTERS.items() if "base" not in entry.config.model_fields]
    _probability = [entry.config for entry in _plain if issubclass(entry.router, SoftmaxTopKRouter)]
    _adaptive = [entry.config for name, entry in ROUTERS.items() if name == "adaptive"]
    _bases = {
        "ProbabilityRouterConfig": _union(_probability),
        "BaseRouterConfig": _union([entry.config for entry in _plain] + _adaptive),
    }
    for _entry in [entry for _, entry in ROUTERS.items()]:
        if "base" in _entry.config.model_fields:
            _entry.config.model_rebuild(_types_namespace=_bases)
    AnyRouterConfig = _union([entry.config for _, entry in ROUTERS.items()])


def router_config(values: dict[str, object]) -> RouterConfig:
    """Returns the options object for a plain mapping with a ``type``, as a model configuration stores it."""
    config: RouterConfig = TypeAdapter(AnyRouterConfig).validate_python(values)
    return config


__all__ = [
    "EMPTY_SLOT",
    "ROUTERS",
    "AnyRouterConfig",
    "Assignment",
    "Contest",
    "Context",
    "Draw",
    "Merged",
    "Outcome",
    "Router",
    "RouterConfig",
    "RouterEntry",
    "RouterPlan",
    "RouterShape",
    "SoftmaxTopKRouter",
    "StepTotals",
    "register_router",
    "router_config",
]
