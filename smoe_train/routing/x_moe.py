"""X-MoE: cosine scores in a low-dimensional space with a learned temperature (arXiv 2204.09179)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.contract import Assignment, Context, Draw, RouterPlan, RouterShape
from smoe_train.routing.losses import load_balance_loss, z_loss
from smoe_train.routing.orthogonal import orthogonal
from smoe_train.routing.registry import register_router
from smoe_train.routing.selection import (
    SoftmaxPlace,
    combination_weights,
    router_dtype,
    select_top_k,
    without_padding,
)
from smoe_train.routing.softmax_top_k import SoftmaxTopKConfig, SoftmaxTopKRouter

LOWEST_TEMPERATURE = 0.01  # as in Tutel: cosines become logits of at most 100
SMALLEST_NORM = 1e-6
BALANCE_TEMPERATURES = {"softmax": 0.3, "sigmoid": 0.07}


class XMoeConfig(SoftmaxTopKConfig):
    """Options of X-MoE's router."""

    beside_scores: ClassVar[frozenset[str]] = frozenset({"softmax", "weights_from"})
    type: Literal["x_moe"] = "x_moe"
    softmax: SoftmaxPlace = "before_top_k"
    """Where the softmax is, with weights_from: softmax. The default is the paper's g = softmax(s / tau)_k, for any k,
    and has a gradient at k = 1; ``after_top_k`` to compare with a top_k router at equal rule (k >= 2)."""
    weights_from: Literal["softmax", "sigmoid"] = "softmax"
    """What weighs a selected expert: the softmax of s / tau, or its own sigmoid(s / tau); the paper has both."""
    projection_dim: int | None = Field(None, ge=2, le=1 << 20)
    """Width of the space that tokens and experts are compared in; half the number of experts (at least 2) if not
    given, as in the paper."""
    temperature_init: float = Field(0.07, gt=LOWEST_TEMPERATURE)
    """Initial temperature tau, trained from there; it stays above 0.01."""
    balance_temperature: float | None = Field(None, gt=0.0)
    """Fixed temperature tau0 of the probabilities in the load-balance loss; the paper's 0.3 for softmax and 0.07 for
    sigmoid if not given."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial projection. Scores do not depend on it; the wider, the slower it turns."""
    embedding_gain: float = Field(0.1, gt=0.0)
    """Scale of the orthogonal initial expert embeddings. Scores do not depend on it; the wider, the slower they
    turn."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """With the sigmoid the softmax option has no effect, and one expert's weight is not always 1."""
        if self.weights_from == "softmax":
            return super().problems(plan)
        if self.softmax != XMoeConfig.model_fields["softmax"].default:
            return [f"softmax: {self.softmax} has no effect with weights_from: sigmoid; remove one of them"]
        return []


@dataclass(frozen=True)
class CosineAssignment(Assignment):
    """An assignment with the scores before the learned temperature.

    Attributes:
        cosines_TE: Cosines of tokens and experts, fp32 (fp64 for fp64 input).
    """

    cosines_TE: Tensor


@register_router("x_moe", XMoeConfig)
class XMoeRouter(SoftmaxTopKRouter):
    """Router that scores by the cosine of a projected token and an expert embedding, divided by a learned temperature.

    ``s_i = (W x) . e_i / (|W x| |e_i|)`` with W [P, D] and e [E, P] trained; logits ``s / tau``, top-k, weights
    ``softmax(s / tau)`` or ``sigmoid(s_k / tau)``. The load-balance loss is ``E sum_i f_i P_i`` with
    ``P = mean softmax(s / tau0)`` at a fixed temperature tau0: 1 at uniformity, below E at collapse, as cosines end
    at +-1, and E in the limit of a small tau0. It does not train tau.

    Source: arXiv 2204.09179 (its published routers disagree: torchscale's normalises experts only and learns no
    temperature). Deviations: ``tau = 0.01 + exp(a)`` with a trained, so tau > 0.01 and its gradient never vanishes
    (the authors' earlier code clamps tau at 1e-4); both sides are normalised in the pass, no parameter is rewritten;
    any k (the paper: 1); f is a share of all slots, where the paper writes a count; dropless; ties break by expert
    index. Norms below 1e-6 count as 1e-6: a token of zeros scores 0 everywhere.
    """

    paper: ClassVar[str] = "arXiv 2204.09179 (X-MoE)"
    summary: ClassVar[str] = "cosine scores in a low-dimensional space, with a learned temperature"
    config: XMoeConfig

    def __init__(self, config: XMoeConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        width = config.projection_dim or max(shape.num_experts // 2, 2)
        self.projection = nn.Parameter(torch.empty(width, shape.d_model))
        self.embeddings = nn.Parameter(torch.empty(shape.num_experts, width))
        self.log_temperature = nn.Parameter(torch.empty(1))  # DeepSpeed broadcasts no 0-dim parameter

    def initialise(self, draw: Draw) -> None:
        """Projection from N(0, init_std^2), embeddings orthogonal of scale embedding_gain, tau = temperature_init.

        Orthogonal are the embeddings themselves if they are at most as many as their width, otherwise the columns of
        their matrix: the experts then lie evenly around the origin.
        """
        config = self.config
        with torch.no_grad():
            self.projection.copy_(draw.normal("projection", tuple(self.projection.shape), config.init_std))
            values = draw.normal("embeddings", tuple(self.embeddings.shape), 1.0)
            self.embeddings.copy_(config.embedding_gain * orthogonal(values))
            self.log_temperature.fill_(math.log(config.temperature_init - LOWEST_TEMPERATURE))

    def temperature(self, dtype: torch.dtype) -> Tensor:
        """Returns tau (0-dim), above 0.01."""
        return LOWEST_TEMPERATURE + self.log_temperature.to(dtype).exp().squeeze()

    def cosines(self, x_TD: Tensor, context: Context) -> Tensor:
        """Returns the cosines [T, E] of tokens and experts, fp32 (fp64 for fp64 input); 0 for padding."""
        dtype = router_dtype(x_TD)
        x_TD = self._jittered(x_TD.to(dtype), context)
        if context.token_mask_T is not None:  # whatever padding holds: the square of its norm must not overflow
            x_TD = torch.where(context.token_mask_T.unsqueeze(1), x_TD, torch.zeros_like(x_TD))
        tokens_TP = F.normalize(F.linear(x_TD, self.projection.to(dtype)), dim=-1, eps=SMALLEST_NORM)
        experts_EP = F.normalize(self.embeddings.to(dtype), dim=-1, eps=SMALLEST_NORM)
        return F.linear(tokens_TP, experts_EP)

    def scores(self, x_TD: Tensor, context: Context) -> Tensor:
        """Returns the logits s / tau [T, E]."""
        cosines_TE = self.cosines(x_TD, context)
        return cosines_TE / self.temperature(cosines_TE.dtype)

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> CosineAssignment:
        """Selects the ``context.top_k`` experts with the largest cosines."""
        with torch.autocast(x_TD.device.type, enabled=False):
            cosines_TE = self.cosines(x_TD, context)
            logits_TE = cosines_TE / self.temperature(cosines_TE.dtype)
            expert_ids_TK = select_top_k(logits_TE, context.top_k)
            if self.config.weights_from == "sigmoid":
                weights_TK = torch.sigmoid(logits_TE.gather(1, expert_ids_TK))
            else:
                weights_TK = combination_weights(logits_TE, expert_ids_TK, self.config.softmax)
        expert_ids_TK, weights_TK = without_padding(expert_ids_TK, weights_TK, context.token_mask_T)
        return CosineAssignment(expert_ids_TK, weights_TK, logits_TE, cosines_TE)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the load-balance loss at the temperature tau0, and the z-loss of the logits."""
        if isinstance(assignment, CosineAssignment):
            cosines_TE = assignment.cosines_TE
        else:  # made from `scores` by a policy over this one; tau cancels, up to rounding in its gradient too
            cosines_TE = assignment.logits_TE * self.temperature(assignment.logits_TE.dtype)
        tau0 = self.config.balance_temperature or BALANCE_TEMPERATURES[self.config.weights_from]
        return {
            "load_balance_loss": load_balance_loss(replace(assignment, logits_TE=cosines_TE / tau0), context),
            "z_loss": z_loss(assignment, context),
        }

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """Everything trains everything, except that the load-balance loss, at its own temperature, trains no tau."""
        declared = super().trained_by(context)
        return {**declared, "load_balance_loss": declared["load_balance_loss"] - {"log_temperature"}}
