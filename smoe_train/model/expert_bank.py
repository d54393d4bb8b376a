"""The only seam to parallelism: a bank runs the experts that tokens were assigned to, wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from smoe_train.model.feed_forward import StackedExperts
from smoe_train.parallel.contest import Choose, Contested, Respond, contest_here
from smoe_train.parallel.dispatch_plan import DispatchPlan, plan_dispatch, row_multiple

MakeExperts = Callable[[range], StackedExperts]


class ExpertBank(Protocol):
    """Runs experts in two parts, so that a recomputation in the backward pass repeats the second alone."""

    def plan(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Any:
        """Decides where each token goes; agrees on sizes with other ranks if there are some.

        Args:
            x_TD: The tokens; only shape, dtype and device count.
            expert_ids_TK: int64 global expert ids, negative in empty slots.
        """
        ...

    def run(self, x_TD: Tensor, plan: Any) -> Tensor:
        """Returns the uncombined outputs [T, K, D] in slot order, zero in empty slots."""
        ...

    def compete(
        self, x_TD: Tensor, respond: Respond, choose: Choose, chunk_tokens: int | None, recompute: bool
    ) -> Contested:
        """Runs every expert once on every token.

        Args:
            x_TD: The tokens; every rank has the same number.
            respond: Expert outputs [R, D] to responses [R].
            choose: Responses [T, E] of some of the tokens, and which these are, to winners [T, K].
            chunk_tokens: Tokens of a rank that are run at once; None for all.
            recompute: Whether activations are computed again in the backward pass instead of stored.

        Returns:
            The responses [T, E], the winners' ids [T, K] and the winners' uncombined outputs [T, K, D].
        """
        ...


class BankFactory(Protocol):
    """Builds the bank of one layer from the number of experts and a way to make any range of them."""

    def __call__(self, num_experts: int, make_experts: MakeExperts) -> nn.Module:
        """Returns a module that is an `ExpertBank`."""
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

    def plan(self, x_TD: Tensor, expert_ids_TK: Tensor) -> DispatchPlan:
        """Returns the order of the tokens by expert."""
        return plan_dispatch(expert_ids_TK, self.num_experts, row_multiple(x_TD))

    def run(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Returns the uncombined outputs [T, K, D] of the assigned experts, zero in empty slots."""
        y_TKD: Tensor = self.experts(x_TD, plan)
        return y_TKD

    def compete(
        self, x_TD: Tensor, respond: Respond, choose: Choose, chunk_tokens: int | None, recompute: bool
    ) -> Contested:
        """Runs every expert once on every token."""
        return contest_here(self.experts, self.num_experts, x_TD, respond, choose, chunk_tokens, recompute)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Plans and runs."""
        return self.run(x_TD, self.plan(x_TD, expert_ids_TK))
