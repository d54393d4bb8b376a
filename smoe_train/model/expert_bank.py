"""The only seam to parallelism: a bank runs the experts that tokens were assigned to, wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from smoe_train.model.feed_forward import StackedExperts
from smoe_train.parallel.dispatch_plan import run_experts

MakeExperts = Callable[[range], StackedExperts]


class BankFactory(Protocol):
    """Builds the bank of one layer from the number of experts and a way to make any range of them."""

    def __call__(self, num_experts: int, make_experts: MakeExperts) -> nn.Module:
        """Returns a module whose forward maps (x_TD, expert_ids_TK) to y_TKD."""
        ...


class LocalExpertBank(nn.Module):
    """All experts of a layer in this process.

    Args:
        num_experts: E.
        make_experts: Makes the stacked experts of a range of global ids.
    """

    def __init__(self, num_experts: int, make_experts: MakeExperts) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.experts = make_experts(range(num_experts))

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Returns the uncombined outputs [T, K, D] of the assigned experts, zero in empty slots (id < 0)."""
        return run_experts(self.experts, x_TD, expert_ids_TK, self.num_experts)
