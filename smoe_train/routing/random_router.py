"""The random control: a frozen linear router of a given scale, to compare generated or trained routers with."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from smoe_train.routing.contract import RouterShape
from smoe_train.routing.frozen_linear import FrozenLinearConfig, FrozenLinearRouter
from smoe_train.routing.registry import register_router


class RandomRouterConfig(FrozenLinearConfig):
    """Options of the random control."""

    type: Literal["random"] = "random"
    router_std: float = Field(0.072, gt=0.0)
    """Standard deviation of the frozen weights; 0.072 is what HyperRouter's generated weights start at for d_model 256
    and hyper_hidden 256. Against a HyperRouter with target_router_std, give the same value."""
    bias_std: float = Field(0.0, ge=0.0)
    """Standard deviation of a frozen bias; 0 for none. HyperRouter's generated bias starts as wide as its weights."""


@register_router("random", RandomRouterConfig)
class RandomRouter(FrozenLinearRouter):
    """Frozen random linear router with weights (and a bias) as wide as those of the policy it is the control of.

    Tokens that score alike go to the same experts throughout, at any fixed or scheduled k. What a policy gains over it
    at equal initial scale is not an effect of that scale.

    Source: the frozen router of SMoE-Dropout (arXiv 2303.01610) at the initial scale of HyperRouter's generated weights
    (arXiv 2312.07035, released code), which neither of them compares with. It is not the random policy of other papers
    that draws experts anew for each token (THOR, arXiv 2110.04260).
    """

    paper: ClassVar[str] = "arXiv 2303.01610 at the scale of arXiv 2312.07035 (control of HyperRouter)"
    summary: ClassVar[str] = "a frozen random linear router of a given scale, the control of HyperRouter"
    config: RandomRouterConfig

    def __init__(self, config: RandomRouterConfig, shape: RouterShape) -> None:
        super().__init__(config, shape, config.router_std, config.bias_std)
