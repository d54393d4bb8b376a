"""The mixture-of-experts layer: assign -> experts -> merge, with router and bank as siblings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoe_train.routing import Contest, Context, Merged, Outcome, Router


class MoeLayer(nn.Module):
    """Routes tokens to experts and combines their outputs.

    The router is a sibling of the bank, never its child: DeepSpeed treats what lies below its MoE module as experts.

    Args:
        router: The layer's routing policy.
        bank: The `ExpertBank` that runs the experts, here or on other ranks.
    """

    def __init__(self, router: Router, bank: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.bank: Any = bank
        self.recompute = False

    def forward(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Merged:
        """Returns the combined outputs, losses and stats of one pass.

        With ``recompute`` the experts' activations are computed again in the backward pass. The routing and the plan
        of who gets which token are not: they are made once, outside, and the recomputation replays them.
        """
        assignment = self.router.assign(x_TD, token_ids_T, context)
        contest = self.router.contest(context)
        if contest is not None:
            outcome = self._compete(x_TD, contest, context.token_mask_T)
            assignment = self.router.settle(assignment, outcome, context)
            return self.router.merge(assignment, outcome.y_TKD, context)
        plan = self.bank.plan(x_TD, assignment.expert_ids_TK)
        if self.recompute and self.training:
            y_TKD = checkpoint(self.bank.run, x_TD, plan, use_reentrant=False)
        else:
            y_TKD = self.bank.run(x_TD, plan)
        return self.router.merge(assignment, y_TKD, context)

    def _compete(self, x_TD: Tensor, contest: Contest, token_mask_T: Tensor | None) -> Outcome:
        if token_mask_T is not None:  # every expert sees every token: what a padded one holds must not overflow
            x_TD = torch.where(token_mask_T.unsqueeze(1), x_TD, torch.zeros((), dtype=x_TD.dtype, device=x_TD.device))
        recompute = self.recompute and self.training
        return Outcome(*self.bank.compete(x_TD, contest.respond, contest.choose, contest.chunk_tokens, recompute))
