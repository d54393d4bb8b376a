"""Adaptive gating: a second expert only for tokens whose first is not clearly better (arXiv 2310.07188)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from smoe_train.routing.contract import (
    EMPTY_SLOT,
    Assignment,
    Context,
    Draw,
    Merged,
    RouterConfig,
    RouterPlan,
    RouterShape,
)
from smoe_train.routing.over_base import OverBaseConfig, RouterOverBase
from smoe_train.routing.registry import register_router
from smoe_train.routing.router import Router
from smoe_train.routing.selection import combination_weights, select_top_k, without_padding
from smoe_train.routing.softmax_top_k import SoftmaxTopKConfig, SoftmaxTopKRouter
from smoe_train.routing.top_k import TopKConfig

if TYPE_CHECKING:  # at run time the union of all probability routers, which exists once all files are read
    ProbabilityRouterConfig = RouterConfig

Gap = Literal["full", "top2_renormalised"]

GAP_BINS = 1024
# Of the gaps counted so far, what remains when another step's are added; in tenths, for integer arithmetic.
MEMORY_TENTHS = 9
FRACTION_BITS = 20


class AdaptiveConfig(OverBaseConfig):
    """Options of adaptive gating."""

    type: Literal["adaptive"] = "adaptive"
    base: ProbabilityRouterConfig = TopKConfig()
    """The router whose probabilities decide; ``type`` chooses it. Its option ``softmax`` has no effect here."""
    threshold: float = Field(0.1, ge=-1.0, le=1.0)
    """A further expert is visited if its probability lies at most this far below the best one's. Below 0 every token
    has one expert, at 1 every token has k. curriculum.threshold schedules it; with target_top2_share it is the
    threshold of the first step only."""
    gap: Gap = "full"
    """What is compared with the threshold: the difference of two probabilities of the softmax over all experts, or of
    the same two divided by their sum. The paper does not say which."""
    weights: Literal["raw", "renormalised"] = "raw"
    """Weigh experts by their probabilities as they are, or divided by the sum over the token's experts. Renormalised,
    a token with one expert has the weight 1, which gives the router no gradient from the task."""
    balance_tokens: Literal["top1_only", "all"] = "top1_only"
    """Tokens whose experts the load-balance loss counts: those with one expert (the paper), or all."""
    eval_router: Literal["adaptive", "top1", "top2"] = "adaptive"
    """Routing outside training: as in training, or one or two experts for every token (never more than k)."""
    target_top2_share: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of tokens that shall have a second expert: each layer's threshold is then the quantile of the gaps that its
    tokens had in about the last ten steps."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """Says what leaves nothing to adapt, gives the router no gradient, or has no effect."""
        assert isinstance(self.base, SoftmaxTopKConfig)
        found: list[str] = []
        if max(plan.top_k_values) == 1:
            found.append("type: adaptive has no effect with k = 1: it chooses between one expert and up to k")
        if self.weights == "renormalised" and (1 in plan.top_k_values or self._never_two()):
            reason = "k = 1" if 1 in plan.top_k_values else f"threshold: {self.threshold}"
            found.append(
                f"weights: renormalised with {reason} gives every token the weight 1, so the router gets no gradient "
                "from the task; use weights: raw"
            )
        found += [
            f"base.{option} has no effect: adaptive weighs experts by its own option weights; leave it out"
            for option in sorted(self.base.beside_scores)
            if getattr(self.base, option) != type(self.base).model_fields[option].default
        ]
        # The base's own rule for weights is not at work, so it cannot be wrong either.
        rest = self.base.model_copy(update={"softmax": "before_top_k"}).problems(plan)
        return found + [f"base: {problem}" for problem in rest]

    def has_threshold(self) -> bool:
        """Unless the threshold follows from a target share."""
        return self.target_top2_share is None

    def varies_experts(self) -> bool:
        """A token has one expert or more, unless the threshold leaves no choice."""
        return self.target_top2_share is not None or 0.0 <= self.threshold < 1.0

    def most_experts(self, top_k: int) -> int:
        """One where the threshold, if no schedule sets it, allows no second."""
        return 1 if self._never_two() else top_k

    def _never_two(self) -> bool:
        return self.threshold < 0.0 and self.target_top2_share is None


@register_router("adaptive", AdaptiveConfig)
class AdaptiveRouter(RouterOverBase):
    """Sends a token to its best expert, and to the next best ones while they are nearly as probable.

    With probabilities ``p = softmax(s)`` of a base router's scores, sorted ``p_(1) >= p_(2) >= ...``, slot j <= k is
    used if ``p_(1) - p_(j) <= threshold``. The comparison is in fp32 (fp64 for fp64 input) and inclusive. The sets are
    nested: a larger threshold or k only adds experts. Outputs are weighed by p as it is (or renormalised).

    Load balance (eq. 4): ``L = E * sum_e f_e P_e`` with f_e expert e's share of the tokens that have exactly one
    expert, counted over all ranks and micro-batches of a step, and P_e its mean probability over all tokens; exactly 0
    if no token has one expert. f carries no gradient, so the gradient comes through all tokens' probabilities.

    Source: arXiv 2310.07188; no code was released. Deviations and extensions: any k (the paper has 1 and 2); the base
    may be any probability router; ``gap``, ``weights`` and ``eval_router`` offer the readings that the paper leaves
    open; ``target_top2_share`` chooses the threshold; the step is the unit of f, where the paper names none.

    Args:
        config: Options.
        shape: What the model around it is like.
        base: The router that scores.
    """

    paper: ClassVar[str] = "arXiv 2310.07188 (Adaptive gating)"
    summary: ClassVar[str] = "one expert a token, and further ones only where they are nearly as probable"
    loss_names: ClassVar[frozenset[str]] = SoftmaxTopKRouter.loss_names
    batch_losses: ClassVar[frozenset[str]] = SoftmaxTopKRouter.batch_losses
    config: AdaptiveConfig
    gap_counts_N: Tensor

    def __init__(self, config: AdaptiveConfig, shape: RouterShape, base: Router) -> None:
        super().__init__(config, shape, base)
        if config.target_top2_share is not None:
            # Integers with a binary fraction: a cast of the model to bf16 leaves them alone.
            self.register_buffer("gap_counts_N", torch.zeros(GAP_BINS, dtype=torch.int64))

    def initialise(self, draw: Draw) -> None:
        """The base's initial values, bit for bit those that it has without adaptive gating; no gap counted yet."""
        self.base.initialise(draw)
        if self.config.target_top2_share is not None:
            self.gap_counts_N.zero_()

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Selects up to ``context.top_k`` experts of each token."""
        config, fixed_k = self.config, self._fixed_k(context)
        # The base's whole assignment: its losses may need more of it than the scores.
        of_base = self.base.assign(x_TD, token_ids_T, context)
        if self.base.contest(context) is not None:
            return of_base  # what it would have done; the contest decides
        logits_TE = of_base.logits_TE
        with torch.autocast(x_TD.device.type, enabled=False):
            ids_TK = select_top_k(logits_TE, min(context.top_k, fixed_k or context.top_k))
            p_TK = combination_weights(logits_TE, ids_TK, "before_top_k")
            used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
            if fixed_k is None:
                gaps_TK = gaps_to_best(p_TK.detach(), config.gap)
                # In rehearsal half of the tokens have one expert, so that the losses of both kinds are at work.
                used_TK = gaps_TK <= (gaps_TK[:, -1].median() if self.rehearsing else self.threshold(context))
                used_TK[:, :1] = True
            if config.weights == "raw":
                weights_TK = torch.where(used_TK, p_TK, torch.zeros((), dtype=p_TK.dtype, device=p_TK.device))
            else:
                chosen_TK = logits_TE.gather(1, ids_TK).masked_fill(~used_TK, -torch.inf)
                weights_TK = torch.softmax(chosen_TK, dim=-1)
        expert_ids_TK = torch.where(used_TK, ids_TK, EMPTY_SLOT)
        expert_ids_TK, weights_TK = without_padding(expert_ids_TK, weights_TK, context.token_mask_T)
        return replace(of_base, expert_ids_TK=expert_ids_TK, weights_TK=weights_TK)

    def threshold(self, context: Context) -> Tensor | float:
        """Returns the threshold of this pass: scheduled, from the counted gaps, or the option."""
        config = self.config
        if config.target_top2_share is None:
            return config.threshold if context.threshold is None else context.threshold
        counted = gap_quantile(self.gap_counts_N, config.target_top2_share)
        return torch.where(self.gap_counts_N.sum() > 0, counted, torch.full_like(counted, config.threshold))

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the base's losses, load balance and z-loss, which see experts of tokens with one expert alone."""
        if self.config.balance_tokens == "top1_only":
            ids_TK = assignment.expert_ids_TK
            alone_T1 = (ids_TK != EMPTY_SLOT).sum(dim=1, keepdim=True) == 1
            assignment = replace(assignment, expert_ids_TK=torch.where(alone_T1, ids_TK, EMPTY_SLOT))
        return self.base.losses(assignment, context)

    def merge(self, assignment: Assignment, y_TKD: Tensor, context: Context) -> Merged:
        """The weighted sum over the used slots; counts what this policy alone knows.

        Further stats: ``wanted_slots`` (slots that were to be used), ``threshold`` (times tokens) and, with a target
        share, ``gap_counts_N`` (tokens by the gap of their second expert, see `gap_quantile`).
        """
        # Either the base computes its losses or this policy does: their totals over a step have one name.
        merge = super().merge if self.base.contest(context) is None else self.base.merge
        merged = merge(assignment, y_TKD, context)
        stats = dict(merged.stats)
        with torch.no_grad():
            stats["wanted_slots"] = stats["slots_E"].sum()
            if self._fixed_k(context) is None:
                stats["threshold"] = stats["tokens"] * self.threshold(context)
            if context.training and self.config.target_top2_share is not None:
                p_T2 = torch.softmax(assignment.logits_TE, dim=-1).topk(2, dim=-1).values
                gap_T = gaps_to_best(p_T2, self.config.gap)[:, 1]
                stats["gap_counts_N"] = count_gaps(gap_T, context.token_mask_T)
        return replace(merged, stats=stats)

    def adapts(self) -> bool:
        """Only with a target share, or if the base does."""
        return self.config.target_top2_share is not None or self.base.adapts()

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Adds the step's gaps to nine tenths of those counted so far."""
        self.base.after_step(stats)
        if self.config.target_top2_share is not None:
            new_N = stats["gap_counts_N"].round().to(torch.int64) << FRACTION_BITS
            self.gap_counts_N.mul_(MEMORY_TENTHS).floor_divide_(10).add_(new_N)

    def _fixed_k(self, context: Context) -> int | None:
        """Returns the number of experts where `eval_router` fixes it."""
        return None if context.training else {"adaptive": None, "top1": 1, "top2": 2}[self.config.eval_router]


def gaps_to_best(p_TK: Tensor, gap: Gap) -> Tensor:
    """Returns how far each of a token's probabilities, best first, lies below the best one.

    Args:
        p_TK: Probabilities of the full softmax.
        gap: ``full``: ``p_1 - p_j``; ``top2_renormalised``: ``(p_1 - p_j) / (p_1 + p_j)``, which is the difference of
            the two after renormalising over this pair, and does not depend on k.
    """
    best_T1 = p_TK[:, :1]
    gap_TK = best_T1 - p_TK
    return gap_TK if gap == "full" else gap_TK / (best_T1 + p_TK)


def count_gaps(gap_T: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Returns how many real tokens have a gap in each of `GAP_BINS` bins (fp32 [N]).

    The bins are equally wide in the angle ``asin(sqrt(gap))``: fine near 0, where the gaps of a flat softmax lie, and
    near 1, where those of a sharp one do.
    """
    angle_T = torch.asin(gap_T.clamp(0.0, 1.0).sqrt()) / (math.pi / 2)
    bin_T = (angle_T * GAP_BINS).to(torch.int64).clamp(0, GAP_BINS - 1)
    real_T = torch.ones_like(gap_T, dtype=torch.float32) if token_mask_T is None else token_mask_T.to(torch.float32)
    return torch.zeros(GAP_BINS, device=gap_T.device).index_add_(0, bin_T, real_T)


def gap_quantile(counts_N: Tensor, share: float) -> Tensor:
    """Returns the gap (0-dim fp32) that this share of the counted tokens does not exceed.

    Within a bin it is linear in the angle.

    Args:
        counts_N: Counts of `count_gaps`, in any unit.
        share: In (0, 1).
    """
    counts_N = counts_N.to(torch.float32)
    below_N = counts_N.cumsum(0)
    goal_1 = below_N[-1:] * share
    index_1 = torch.searchsorted(below_N, goal_1).clamp(max=GAP_BINS - 1)  # kept 1-dim: a 0-dim index is read back
    within_1 = counts_N.gather(0, index_1)
    missing_1 = below_N.gather(0, index_1) - goal_1
    angle_1 = (index_1 + 1 - missing_1 / within_1.clamp(min=1.0)) / GAP_BINS
    return torch.sin(angle_1 * (math.pi / 2)).square().squeeze(0)
