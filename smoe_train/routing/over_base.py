"""What policies over a base share: everything that they do not do themselves is the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from smoe_train.routing.contract import Assignment, Contest, Context, Outcome, RouterConfig, RouterShape
from smoe_train.routing.registry import ROUTERS
from smoe_train.routing.router import Router


class OverBaseConfig(RouterConfig):
    """Options of a policy over a base; each names the bases it can stand over in a field ``base`` of its own."""

    if TYPE_CHECKING:
        base: RouterConfig

    def loss_coefficients(self) -> dict[str, float]:
        """Those of the base."""
        return self.base.loss_coefficients()

    def competes(self) -> bool:
        """Whether the base does."""
        return self.base.competes()

    def has_threshold(self) -> bool:
        """Whether the base does."""
        return self.base.has_threshold()

    def varies_experts(self) -> bool:
        """Whether the base does."""
        return self.base.varies_experts()


class RouterOverBase(Router):
    """A router that holds another, in its submodule ``base``, and is that router wherever it says nothing else.

    Args:
        config: Options.
        shape: The model around it.
        base: The router below.
    """

    config: OverBaseConfig

    def __init__(self, config: OverBaseConfig, shape: RouterShape, base: Router) -> None:
        super().__init__(config, shape)
        self.base = base
        self.looks_back_tokens = base.looks_back_tokens
        self.rehearsing = False

    @classmethod
    def build(cls, config: RouterConfig, shape: RouterShape, num_layers: int) -> list[Router]:
        """Returns one router a layer, over those that the base's own policy builds."""
        assert isinstance(config, OverBaseConfig)
        bases = ROUTERS.get(config.base.type).router.build(config.base, shape, num_layers)
        return [cls(config, shape, base) for base in bases]

    @classmethod
    def losses_of(cls, config: RouterConfig) -> frozenset[str]:
        """The base's losses and those of this policy."""
        assert isinstance(config, OverBaseConfig)
        return ROUTERS.get(config.base.type).router.losses_of(config.base) | cls.loss_names

    @classmethod
    def batch_losses_of(cls, config: RouterConfig) -> frozenset[str]:
        """The base's and those of this policy."""
        assert isinstance(config, OverBaseConfig)
        return ROUTERS.get(config.base.type).router.batch_losses_of(config.base) | cls.batch_losses

    def contest(self, context: Context) -> Contest | None:
        """The base's: where experts compete, every token has k winners."""
        return self.base.contest(context)

    def settle(self, assignment: Assignment, outcome: Outcome, context: Context) -> Assignment:
        """As the base."""
        return self.base.settle(assignment, outcome, context)

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """As the base."""
        trained = self.base.trained_by(context)
        return {loss: frozenset(f"base.{name}" for name in names) for loss, names in trained.items()}

    def losses_reaching_experts(self, context: Context) -> frozenset[str]:
        """As the base."""
        return self.base.losses_reaching_experts(context)

    @contextmanager
    def rehearsal(self, stats: Mapping[str, Tensor]) -> Iterator[None]:
        """Sets ``rehearsing``, here and wherever the base does."""
        self.rehearsing = True
        try:
            with self.base.rehearsal(stats):
                yield
        finally:
            self.rehearsing = False

    def late_frozen(self) -> list[nn.Parameter]:
        """Those of the base."""
        return self.base.late_frozen()

    def begin_anew(self) -> None:
        """As the base."""
        self.base.begin_anew()

    def frozen(self, step: int) -> bool:
        """As the base."""
        return self.base.frozen(step)
