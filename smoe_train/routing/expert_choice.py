"""Expert choice: experts choose tokens, so every expert gets the same number (arXiv 2202.09368)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.contract import EMPTY_SLOT, Assignment, Context, Draw, RouterConfig, RouterPlan, RouterShape
from smoe_train.routing.losses import z_loss
from smoe_train.routing.registry import register_router
from smoe_train.routing.router import Router
from smoe_train.routing.selection import router_dtype, select_top_k

NEVER = -1.0  # below every probability


class ExpertChoiceConfig(RouterConfig):
    """Options of expert choice; k is the mean number of experts a token, the paper's capacity factor."""

    when_loaded: ClassVar[Mapping[str, Any]] = {"allow_future_leak": False}

    type: Literal["expert_choice"] = "expert_choice"
    group: Literal["sequence", "micro_batch"] = "sequence"
    """Among which tokens an expert chooses: those of one sequence, whatever the micro-batch and the ranks are, or those
    of a rank's micro-batch, as the paper does; the result then depends on both."""
    max_experts_per_token: int | None = Field(None, ge=1)
    """Most experts a token; of more that chose it, those with the highest probability stay, and loads are not exactly
    equal any more. No limit if not given; memory grows with this number (with num_experts, if not given)."""
    allow_future_leak: bool = False
    """Has to be set to train a causal language model: whether an expert chooses a token depends on later tokens, so the
    model sees a little of what it predicts. Its losses are not comparable, and it cannot generate."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """A causal language model must not see later tokens, unless that is what is wanted."""
        found = []
        if plan.causal and not self.allow_future_leak:
            found.append(
                "expert_choice looks at later tokens, so a causal language model would see a little of what it "
                "predicts: its losses are not comparable and it cannot generate; use another router, or set "
                "allow_future_leak: true if that is understood"
            )
        if self.allow_future_leak and not plan.causal:
            found.append("allow_future_leak: has no effect, since every token may see the later ones; leave it out")
        if self.max_experts_per_token is not None and self.max_experts_per_token >= plan.num_experts:
            found.append(f"max_experts_per_token: has no effect with num_experts {plan.num_experts}; leave it out")
        return found

    def most_experts(self, top_k: int) -> int:
        """As many as choose it, whatever k is."""
        return self.max_experts_per_token or sys.maxsize

    def varies_experts(self) -> bool:
        """A token has between 0 and E experts."""
        return True


@register_router("expert_choice", ExpertChoiceConfig)
class ExpertChoiceRouter(Router):
    """Each expert takes the ``C`` tokens of a group that have the highest probability for it.

    ``p = softmax(x W^T)`` over the experts; ``C = ceil(S k / E)`` for the S real tokens of a group, so that no group
    is too short to be routed; weights are p as it is. A token has between 0 and E experts: one without any passes
    through the residual connection alone. Ties go to the earlier token, padding is never chosen.

    Not causal: whether a token is chosen depends on the tokens after it.

    Source: arXiv 2202.09368, section 3.2. Deviations: groups are sequences by default (there the tokens of a device's
    batch); C is rounded up; a limit on the experts a token is a cut, not the paper's linear program; z-loss optional.
    """

    loss_names: ClassVar[frozenset[str]] = frozenset({"z_loss"})
    causal: ClassVar[bool] = False
    selects_by_logits: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2202.09368 (Expert Choice)"
    summary: ClassVar[str] = "experts choose tokens, so loads are equal; not causal"
    config: ExpertChoiceConfig

    def __init__(self, config: ExpertChoiceConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, init_std^2)."""
        with torch.no_grad():
            self.weight.copy_(draw.normal("weight", tuple(self.weight.shape), self.config.init_std))

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Lets the experts choose, and lists each token's experts, the likeliest first."""
        dtype = router_dtype(x_TD)
        num_slots = min(self.config.max_experts_per_token or self.shape.num_experts, self.shape.num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
            p_TE = torch.softmax(logits_TE, dim=-1)
            chosen_TE = self._chosen(p_TE.detach(), context)
            ids_TK = select_top_k(torch.where(chosen_TE, p_TE, NEVER), num_slots)
            used_TK = chosen_TE.gather(1, ids_TK)
            weights_TK = torch.where(used_TK, p_TE.gather(1, ids_TK), torch.zeros((), dtype=dtype, device=p_TE.device))
        return Assignment(torch.where(used_TK, ids_TK, EMPTY_SLOT), weights_TK, logits_TE)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the z-loss; there is nothing to balance."""
        return {"z_loss": z_loss(assignment, context)}

    def _chosen(self, p_TE: Tensor, context: Context) -> Tensor:
        """Returns which experts choose which tokens, bool [T, E]."""
        num_tokens, num_experts = p_TE.shape
        length = max(num_tokens, 1)
        if self.config.group == "sequence" and context.sequence_length is not None:
            length = context.sequence_length
        p_GSE = p_TE.view(-1, length, num_experts)
        if context.token_mask_T is None:
            real_GS = torch.ones(p_GSE.shape[:2], dtype=torch.bool, device=p_TE.device)
        else:
            real_GS = context.token_mask_T.view(-1, length)
        wanted_GSE = torch.where(real_GS.unsqueeze(2), p_GSE, NEVER)
        order_GSE = torch.sort(wanted_GSE, dim=1, descending=True, stable=True).indices
        place_GSE = torch.argsort(order_GSE, dim=1)  # of each token in each expert's order
        capacity_G = (real_GS.sum(dim=1) * context.top_k + num_experts - 1) // num_experts
        # Padding comes last in every order, and C is at most the number of real tokens.
        return (place_GSE < capacity_G.view(-1, 1, 1)).view(num_tokens, num_experts)
