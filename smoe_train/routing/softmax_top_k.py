"""What linear routers share: fp32 scores from a weight matrix, top-k, softmax weights, balance and z losses."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from smoe_train.routing.contract import Assignment, Context, RouterConfig, RouterPlan, RouterShape
from smoe_train.routing.losses import load_balance_loss, z_loss
from smoe_train.routing.noise import uniform_noise
from smoe_train.routing.router import Router
from smoe_train.routing.selection import (
    SoftmaxPlace,
    combination_weights,
    router_dtype,
    select_top_k,
    without_padding,
)


class SoftmaxTopKConfig(RouterConfig):
    """Options of every router that scores with one matrix and selects the top k.

    Attributes:
        beside_scores: Options without effect on the scores; a policy over such a router, which takes nothing else from
            it, refuses them.
    """

    beside_scores: ClassVar[frozenset[str]] = frozenset({"softmax"})
    softmax: SoftmaxPlace = "after_top_k"
    """Softmax over the selected scores, or over all experts before selection (kept as is, or renormalised)."""
    jitter: float = Field(0.0, ge=0.0, lt=1.0)
    """Training only: multiplies the router's input by uniform noise in 1 +- jitter (Switch, arXiv 2101.03961)."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """A single renormalised weight is always 1: the router would get no gradient from the task."""
        if 1 in plan.top_k_values and self.softmax != "before_top_k":
            return [
                f"softmax: {self.softmax} with k = 1 gives every token the weight 1, so the router gets no gradient "
                "from the task; use softmax: before_top_k or k >= 2"
            ]
        return []


class SoftmaxTopKRouter(Router):
    """Scores experts, selects the k best and weighs them by a softmax: a probability router.

    Scores are ``x W^T + b`` with W and b from `weight_and_bias`; a policy that scores otherwise overrides `scores`.
    Adaptive gating works over any such router.
    """

    loss_names: ClassVar[frozenset[str]] = frozenset({"load_balance_loss", "z_loss"})
    batch_losses: ClassVar[frozenset[str]] = frozenset({"load_balance_loss"})
    config: SoftmaxTopKConfig

    def __init__(self, config: SoftmaxTopKConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Returns the router's weight [E, D] and bias [E], or None for no bias."""
        raise NotImplementedError(f"{type(self).__name__} has neither a weight matrix nor scores of its own")

    def scores(self, x_TD: Tensor, context: Context) -> Tensor:
        """Returns the logits [T, E] of the softmax, fp32 (fp64 for fp64 input); the caller switches autocast off."""
        dtype = router_dtype(x_TD)
        weight_ED, bias_E = self.weight_and_bias()
        x_TD = self._jittered(x_TD.to(dtype), context)
        return F.linear(x_TD, weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Selects the ``context.top_k`` best-scored experts of each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.scores(x_TD, context)
            expert_ids_TK = select_top_k(logits_TE, context.top_k)
            weights_TK = combination_weights(logits_TE, expert_ids_TK, self.config.softmax)
        expert_ids_TK, weights_TK = without_padding(expert_ids_TK, weights_TK, context.token_mask_T)
        return Assignment(expert_ids_TK, weights_TK, logits_TE)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the load-balance loss and the z-loss."""
        return {
            "load_balance_loss": load_balance_loss(assignment, context),
            "z_loss": z_loss(assignment, context),
        }

    def _jittered(self, x_TD: Tensor, context: Context) -> Tensor:
        if self.config.jitter == 0.0 or not context.training:
            return x_TD
        index_T = context.token_index_T
        if index_T is None:
            index_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        noise_TD = uniform_noise(context.seed, context.step, context.layer, index_T, x_TD.shape[1])
        return x_TD * (1.0 + self.config.jitter * (2.0 * noise_TD.to(x_TD.dtype) - 1.0))
