"""SMoE-Dropout: a frozen random router and a growing number of experts a token (arXiv 2303.01610)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from smoe_train.routing.contract import RouterShape
from smoe_train.routing.frozen_linear import FrozenLinearConfig, FrozenLinearRouter
from smoe_train.routing.registry import register_router


class SmoeDropoutConfig(FrozenLinearConfig):
    """Options of SMoE-Dropout's router; its other half is the schedule ``curriculum.top_k``."""

    type: Literal["smoe_dropout"] = "smoe_dropout"
    router_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the frozen weights (0.02 in the released code)."""


@register_router("smoe_dropout", SmoeDropoutConfig)
class SmoeDropoutRouter(FrozenLinearRouter):
    """Frozen random linear router, meant to be trained with k growing from E / 2 to E.

    Scores ``x W^T`` with W from N(0, router_std^2), never trained; top-k, softmax over the selected scores. Experts
    are chosen at random at first, and the assignment still changes in training, since the tokens do. No dropout layer
    is involved: the name means that the experts left out are dropped, ever fewer of them.

    Source: arXiv 2303.01610 and its released code. No balance loss there: set load_balance_coefficient to 0, as the
    shipped recipes do. Deviations: the gate's frozen bias of 0 is left out; ties break by expert index.
    """

    paper: ClassVar[str] = "arXiv 2303.01610 (SMoE-Dropout)"
    summary: ClassVar[str] = "a frozen random linear router; with k growing over training"
    config: SmoeDropoutConfig

    def __init__(self, config: SmoeDropoutConfig, shape: RouterShape) -> None:
        super().__init__(config, shape, config.router_std)
