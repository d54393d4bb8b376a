"""The router contract: which experts a token visits (assign), and what becomes of their outputs (merge).

A router is arithmetic only. It holds no process group, draws no random numbers inside ``forward`` and never infers
training from ``requires_grad``: everything that varies comes in the `Context`, which is the same on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from smoe_train.routing.contract import Assignment, Context, Draw, Merged, RouterConfig, RouterShape
from smoe_train.routing.losses import routing_stats


class Router(nn.Module, ABC):
    """Base of all routing policies: one file and one recipe each; the conformance suite runs over all of them.

    Attributes:
        loss_names: Auxiliary losses that the policy can return; a coefficient for any other is a mistake.
        paper: Where the policy comes from, with its arXiv id.
        summary: The idea in one line.
    """

    loss_names: ClassVar[frozenset[str]]
    paper: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    @classmethod
    def build(cls, config: RouterConfig, shape: RouterShape, num_layers: int) -> list[Router]:
        """Returns one router for each of ``num_layers`` MoE layers; a policy that shares parts overrides this."""
        return [cls(config, shape) for _ in range(num_layers)]

    @abstractmethod
    def initialise(self, draw: Draw) -> None:
        """Sets every parameter and buffer to its initial value."""

    @abstractmethod
    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Chooses experts and weights for each token.

        Args:
            x_TD: Input of the MoE layer, any floating dtype; the arithmetic is fp32 (fp64 for fp64 input).
            token_ids_T: int64 vocabulary ids of the same tokens.
            context: The decisions for this pass.
        """

    @abstractmethod
    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the auxiliary losses that the assignment alone determines."""

    def merge(self, assignment: Assignment, y_TKD: Tensor, context: Context) -> Merged:
        """Combines the experts' outputs: by default the weighted sum over the slots.

        Args:
            assignment: What `assign` returned.
            y_TKD: Uncombined expert outputs in slot order, zero in empty slots.
            context: The decisions for this pass.
        """
        out_TD = torch.bmm(assignment.weights_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)
        return Merged(out_TD, self.losses(assignment, context), routing_stats(assignment, context))

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Called once after each optimizer step with the step's summed stats; the only place to change a buffer."""
