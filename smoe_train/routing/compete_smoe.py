"""CompeteSMoE: in some steps all experts compete for each token by their outputs, and the router learns who wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from smoe_train.registry import suggest
from smoe_train.routing.contract import (
    Assignment,
    Contest,
    Context,
    Draw,
    Merged,
    Outcome,
    RouterPlan,
    RouterShape,
)
from smoe_train.routing.losses import load_balance_loss
from smoe_train.routing.registry import register_router
from smoe_train.routing.responses import RESPONSES
from smoe_train.routing.selection import router_dtype, select_top_k, without_padding
from smoe_train.routing.softmax_top_k import SoftmaxTopKConfig, SoftmaxTopKRouter

COMPETITION_LOSSES = ("router_distillation_loss", "diversity_loss", "competition_balance_loss")
LEAST_VARIANCE = 1e-12  # of the responses to one token; below it they are equal up to rounding

# What each version does; a preset's options may be left out, and these may not be given otherwise.
PRESETS: dict[str, dict[str, str]] = {
    "v2": {},
    "v1": {"response": "l2norm", "winner_weights": "softmax", "target": "winners"},
}
PRESET_COEFFICIENTS: dict[str, dict[str, float]] = {
    "v2": {},
    "v1": {"router_coefficient": 0.05, "diversity_coefficient": 0.0, "competition_balance_coefficient": 0.0},
}


def _known_response(name: str) -> str:
    if name not in RESPONSES.names():
        raise ValueError(f"unknown response{suggest(name, RESPONSES.names())}")
    return name


ResponseName = Annotated[str, AfterValidator(_known_response), Field(json_schema_extra={"enum": [*RESPONSES.names()]})]


class CompeteSmoeConfig(SoftmaxTopKConfig):
    """Options of CompeteSMoE; when experts compete is curriculum.competition."""

    type: Literal["compete_smoe"] = "compete_smoe"
    preset: Literal["v2", "v1"] = "v2"
    """``v2``: arXiv 2505.13380, the defaults below. ``v1``: in the style of 2402.02526: response l2norm, winner_weights
    softmax and target winners, which then may not be given otherwise, and unless they are given, router_coefficient
    0.05, diversity_coefficient 0 and competition_balance_coefficient 0. There experts compete in every step:
    curriculum.competition.flip_rate 1.0 and max_layers null."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the router's initial weights."""
    response: ResponseName = "softplus_mean"
    """What experts compete by, a function of an expert's output: ``softplus_mean``, ``l2norm``, ``relu_mean``,
    ``silu_mean`` or ``sigmoid_mean``."""
    winner_weights: Literal["sum_norm", "softmax"] = "sum_norm"
    """Weights of the winners' outputs: their responses divided by the sum of these, or the softmax of these."""
    score_norm: Literal["none", "standardise"] = "none"
    """``standardise``: before the target's softmax, a token's responses are shifted and scaled to mean 0 and variance 1
    over the experts. Mean responses differ little between experts, so that the plain target is almost uniform."""
    temperature: float = Field(1.0, gt=0.0)
    """Divides the responses before the target's softmax; below 1 the target is sharper."""
    target: Literal["all", "winners"] = "all"
    """What the router learns: the softmax of the responses over all experts, or over the winners and 0 elsewhere."""
    distillation: Literal["all", "topk", "hybrid", "tribrid"] = "all"
    """Experts that router and target are compared on: all, the winners, all plus theta times the winners, or that plus
    theta times the experts that the router would have chosen."""
    distillation_loss: Literal["mse", "kl"] = "mse"
    """``mse``: mean over experts of the squared difference of probabilities. ``kl``: divergence of the router from the
    target; over some of the experts, of both restricted to these and normalised."""
    theta: float = Field(0.1, gt=0.0)
    """Weight of the further terms of distillation hybrid and tribrid."""
    competition_chunk_tokens: int | None = Field(None, ge=1)
    """Tokens of a rank that compete at once; null for all of a micro-batch. Fewer bound the memory of a contest, N / K
    times that of a routed layer, if training.activation_checkpointing is experts or all; otherwise only what is held
    in passing."""
    router_coefficient: float = Field(0.01, ge=0.0)
    """Weight of the router's distillation loss (mean over MoE layers, 0 in those that do not compete)."""
    diversity_coefficient: float = Field(0.01, ge=0.0)
    """Weight of the winners' mean cosine similarity (mean over MoE layers, 0 in those that do not compete)."""
    competition_balance_coefficient: float = Field(0.01, ge=0.0)
    """Weight of the load balance of contests (mean over MoE layers, 0 in those that do not compete)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Options that are not given get the preset's value."""
        if not isinstance(values, Mapping) or not isinstance(values.get("preset"), str):
            return values
        preset = values["preset"]
        return {**PRESETS.get(preset, {}), **PRESET_COEFFICIENTS.get(preset, {}), **values}

    def problems(self, plan: RouterPlan) -> list[str]:
        """Options against the preset, weights that would not be positive, and options without effect."""
        found = super().problems(plan)
        for option, value in PRESETS[self.preset].items():
            if getattr(self, option) != value:
                found.append(f"preset: {self.preset} means {option}: {value}; leave one of the two out")
        if RESPONSES.get(self.response).signed and self.winner_weights == "sum_norm":
            found.append(f"response: {self.response} can be negative, so it needs winner_weights: softmax")
        if self.distillation in ("all", "topk") and self.theta != type(self).model_fields["theta"].default:
            found.append(f"theta has no effect with distillation: {self.distillation}; leave it out")
        default = type(self).model_fields["diversity_coefficient"].default
        if plan.top_k_values == {1} and self.diversity_coefficient not in (0.0, default):
            found.append("diversity_coefficient has no effect with k = 1: one winner is not compared with another")
        return found

    def loss_coefficients(self) -> dict[str, float]:
        """Returns the coefficients of the losses of contests."""
        values = (self.router_coefficient, self.diversity_coefficient, self.competition_balance_coefficient)
        return dict(zip(COMPETITION_LOSSES, values, strict=True))

    def competes(self) -> bool:
        """Experts compete."""
        return True


@dataclass(frozen=True)
class Settled(Assignment):
    """An assignment that a contest has led to; the logits are the router's.

    Attributes:
        responses_TE: The experts' responses.
        routed_ids_TK: The experts that the router would have chosen.
    """

    responses_TE: Tensor
    routed_ids_TK: Tensor


@register_router("compete_smoe", CompeteSmoeConfig)
class CompeteSmoeRouter(SoftmaxTopKRouter):
    """A trained linear router that learns from contests between the experts.

    In a competing layer every expert runs on every token. The k with the largest responses win, their outputs are
    combined by their responses, and the router learns the distribution of responses; the task does not reach it.
    In all other passes, and always in evaluation, this is `top_k`, bit for bit.

    Losses by kind of pass: a competing one has the distillation, diversity and competition balance losses, a routed one
    the load-balance loss and the z-loss; each of the others is 0 there. So the mean over the MoE layers, which the
    model takes, is over all of them, and a layer's share does not grow when others do not compete.

    Source: arXiv 2505.13380 and its released code. Deviations: winners' outputs are reused, not computed again;
    responses are computed in fp32 from the outputs; targets can be sharpened (temperature, score_norm); the diversity
    loss is divided by K (K - 1), not K^2; both balance losses count all K choices, not the first; who competes when is
    a function of seed, step and layer. ``preset: v1`` follows 2402.02526 with a target that is detached and in the
    order of the experts; it has no ``combine_gate``.
    """

    paper: ClassVar[str] = "arXiv 2505.13380 (v2); 2402.02526 (v1)"
    summary: ClassVar[str] = "in some steps experts compete by their outputs, and the router learns who wins"
    loss_names: ClassVar[frozenset[str]] = SoftmaxTopKRouter.loss_names | frozenset(COMPETITION_LOSSES)
    batch_losses: ClassVar[frozenset[str]] = SoftmaxTopKRouter.batch_losses | {"competition_balance_loss"}
    config: CompeteSmoeConfig

    def __init__(self, config: CompeteSmoeConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, init_std^2)."""
        with torch.no_grad():
            self.weight.copy_(draw.normal("weight", tuple(self.weight.shape), self.config.init_std))

    def weight_and_bias(self) -> tuple[Tensor, None]:
        """Returns the trained weight."""
        return self.weight, None

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """In a competing pass the distillation loss alone trains the router."""
        competing = self.contest(context) is not None
        weight, nothing = frozenset({"weight"}), frozenset[str]()
        return {
            **dict.fromkeys(["task", *SoftmaxTopKRouter.loss_names], nothing if competing else weight),
            **dict.fromkeys(COMPETITION_LOSSES, nothing),
            "router_distillation_loss": weight if competing else nothing,
        }

    def losses_reaching_experts(self, context: Context) -> frozenset[str]:
        """Diversity reaches the winners, competition balance all experts; the distillation target is detached."""
        if self.contest(context) is None:
            return frozenset()
        return frozenset({"diversity_loss", "competition_balance_loss"})

    def contest(self, context: Context) -> Contest | None:
        """Returns how experts compete where the curriculum says so, in training."""
        if not (context.competing and context.training):
            return None

        def respond(y_RD: Tensor) -> Tensor:
            with torch.autocast(y_RD.device.type, enabled=False):
                return RESPONSES.get(self.config.response).of(y_RD.to(router_dtype(y_RD)))

        def choose(responses_TE: Tensor, part: slice) -> Tensor:
            winners_TK = select_top_k(responses_TE, context.top_k)
            mask_T = None if context.token_mask_T is None else context.token_mask_T[part]
            return without_padding(winners_TK, winners_TK, mask_T)[0]

        return Contest(respond, choose, self.config.competition_chunk_tokens)

    def settle(self, assignment: Assignment, outcome: Outcome, context: Context) -> Settled:
        """Weighs the winners by their responses; the gradient of the task reaches the experts through these too."""
        with torch.autocast(outcome.responses_TE.device.type, enabled=False):
            won_TK = outcome.responses_TE.gather(1, outcome.expert_ids_TK.clamp(min=0))
            weights_TK = torch.softmax(won_TK, dim=-1) if self.config.winner_weights == "softmax" else _shares(won_TK)
        ids_TK, weights_TK = without_padding(outcome.expert_ids_TK, weights_TK, context.token_mask_T)
        return Settled(ids_TK, weights_TK, assignment.logits_TE, outcome.responses_TE, assignment.expert_ids_TK)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the losses of the kind of pass, and 0 for those of the other kind."""
        none = dict.fromkeys(sorted(self.loss_names), assignment.logits_TE.new_zeros(()))
        if not isinstance(assignment, Settled):
            return {**none, **super().losses(assignment, context)}
        with torch.autocast(assignment.logits_TE.device.type, enabled=False):
            contested = replace(assignment, logits_TE=self._scores_of_responses(assignment))
            return {
                **none,
                "router_distillation_loss": self._distillation_loss(assignment, context),
                "competition_balance_loss": load_balance_loss(contested, context),
            }

    def merge(self, assignment: Assignment, y_TKD: Tensor, context: Context) -> Merged:
        """Adds what needs the winners' outputs, and the statistics of contests, which are 0 in a routed pass."""
        merged = super().merge(assignment, y_TKD, context)
        losses = merged.losses
        if isinstance(assignment, Settled):
            with torch.autocast(y_TKD.device.type, enabled=False):
                losses = {**losses, "diversity_loss": diversity_loss(y_TKD, context)}
        return replace(merged, losses=losses, stats={**merged.stats, **contest_stats(assignment, context)})

    def _scores_of_responses(self, assignment: Settled) -> Tensor:
        """Returns the scores [T, E] whose softmax is the distribution of responses, with gradient into the experts."""
        scores_TE = assignment.responses_TE
        if self.config.score_norm == "standardise":
            scores_TE = scores_TE - scores_TE.mean(dim=-1, keepdim=True)
            scores_TE = scores_TE * torch.rsqrt(_variance(scores_TE) + LEAST_VARIANCE)
        return scores_TE / self.config.temperature

    def _distillation_loss(self, assignment: Settled, context: Context) -> Tensor:
        """Compares the router's full softmax with the detached target."""
        scores_TE = self._scores_of_responses(assignment).detach()
        winners_TK, routed_TK = (ids.clamp(min=0) for ids in (assignment.expert_ids_TK, assignment.routed_ids_TK))
        if self.config.target == "winners":
            loses_TE = torch.ones_like(scores_TE, dtype=torch.bool).scatter(1, winners_TK, False)
            scores_TE = scores_TE.masked_fill(loses_TE, -torch.inf)
        target_TE = torch.softmax(scores_TE, dim=-1)
        log_p_TE = torch.log_softmax(assignment.logits_TE, dim=-1)
        difference = squared_difference if self.config.distillation_loss == "mse" else divergence
        compared: list[Tensor | None] = [winners_TK] if self.config.distillation == "topk" else [None]
        if self.config.distillation in ("hybrid", "tribrid"):
            compared.append(winners_TK)
        if self.config.distillation == "tribrid":
            compared.append(routed_TK)
        loss_T, *further_T = (difference(log_p_TE, target_TE, ids_TK) for ids_TK in compared)
        if further_T:
            loss_T = loss_T + self.config.theta * sum(further_T[1:], further_T[0])
        return context.token_mean(loss_T)


def squared_difference(log_p_TE: Tensor, target_TE: Tensor, ids_TK: Tensor | None = None) -> Tensor:
    """Returns the mean squared difference of probabilities [T], over all experts or over some."""
    difference_TE = log_p_TE.exp() - target_TE
    return (difference_TE if ids_TK is None else difference_TE.gather(1, ids_TK)).square().mean(dim=-1)


def divergence(log_p_TE: Tensor, target_TE: Tensor, ids_TK: Tensor | None = None) -> Tensor:
    """Returns KL(target || p) [T], over all experts, or of both restricted to some and normalised."""
    if ids_TK is not None:
        log_p_TE = torch.log_softmax(log_p_TE.gather(1, ids_TK), dim=-1)
        target_TE = target_TE.gather(1, ids_TK)
        # A target that is 0 on all of these asks for nothing there.
        total_T1 = target_TE.sum(dim=-1, keepdim=True)
        target_TE = target_TE / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
    return (torch.xlogy(target_TE, target_TE) - target_TE * log_p_TE).sum(dim=-1)


def diversity_loss(y_TKD: Tensor, context: Context) -> Tensor:
    """Mean cosine similarity of two different winners' outputs (0-dim, fp32 or wider).

    1 for equal outputs, 0 for orthogonal ones, at least -1 / (K - 1). An output of zeros is similar to nothing, and one
    winner alone gives 0.

    Source: arXiv 2505.13380, released code. Deviation: there the sum over pairs is divided by K^2.
    """
    y_TKD = y_TKD.to(router_dtype(y_TKD))
    top_k = y_TKD.shape[1]
    norm_TK1 = torch.linalg.vector_norm(y_TKD, dim=-1, keepdim=True)
    unit_TKD = y_TKD / torch.where(norm_TK1 > 0, norm_TK1, torch.ones_like(norm_TK1))
    cosine_TKK = torch.bmm(unit_TKD, unit_TKD.transpose(1, 2))
    others_KK = 1.0 - torch.eye(top_k, dtype=y_TKD.dtype, device=y_TKD.device)
    return context.token_mean((cosine_TKK * others_KK).sum(dim=(1, 2)) / max(top_k * (top_k - 1), 1))


def contest_stats(assignment: Assignment, context: Context) -> dict[str, Tensor]:
    """Returns detached sums that describe contests; those named ``.../competing`` are to be divided by ``competing``.

    Keys: ``competing`` (tokens that were competed for), and over these tokens ``agreement/competing`` (share of the
    winners that the router would have chosen too), ``score_spread/competing`` (standard deviation of the responses over
    the experts) and ``tie_rate/competing`` (whether a loser's response equals a winner's: the index decided).
    """
    names = ("competing", "agreement/competing", "score_spread/competing", "tie_rate/competing")
    if not isinstance(assignment, Settled):
        return dict.fromkeys(names, torch.zeros((), dtype=torch.float32, device=assignment.logits_TE.device))
    with torch.no_grad():
        responses_TE, winners_TK = assignment.responses_TE, assignment.expert_ids_TK
        top_k, num_experts = winners_TK.shape[1], responses_TE.shape[1]
        agreed_TK = (winners_TK.unsqueeze(2) == assignment.routed_ids_TK.unsqueeze(1)).any(dim=2)
        ranked_TE = torch.sort(responses_TE, dim=-1, descending=True).values
        tied_T = ranked_TE[:, top_k - 1] == ranked_TE[:, min(top_k, num_experts - 1)]
        values_TV = torch.stack(
            [
                torch.ones_like(responses_TE[:, 0]),
                agreed_TK.to(responses_TE.dtype).mean(dim=1),
                _variance(responses_TE).squeeze(1).sqrt(),
                (tied_T & (top_k < num_experts)).to(responses_TE.dtype),
            ],
            dim=1,
        )
        if context.token_mask_T is not None:
            values_TV = torch.where(context.token_mask_T.unsqueeze(1), values_TV, torch.zeros_like(values_TV))
        return dict(zip(names, values_TV.sum(dim=0).float().unbind(), strict=True))


def _variance(scores_TE: Tensor) -> Tensor:
    """Returns the variance over the experts [T, 1]; torch's own warns where there is no token."""
    return (scores_TE - scores_TE.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True)


def _shares(responses_TK: Tensor) -> Tensor:
    """Returns each response divided by their sum; equal shares where all are 0."""
    total_T1 = responses_TK.sum(dim=-1, keepdim=True)
    shares_TK = responses_TK / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
    return torch.where(total_T1 > 0, shares_TK, torch.full_like(shares_TK, 1.0 / responses_TK.shape[1]))
