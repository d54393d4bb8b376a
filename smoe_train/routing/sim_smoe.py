"""SimSMoE (arXiv 2406.15883) over any policy: experts that are chosen together and have become alike are separated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.cka import LEAST_TOKENS, Estimator, SigmaMode, Similarity, cka_linear, cka_rbf, linear_sums
from smoe_train.routing.contract import (
    EMPTY_SLOT,
    Assignment,
    Context,
    Draw,
    Merged,
    Outcome,
    RouterConfig,
    RouterPlan,
    RouterShape,
)
from smoe_train.routing.expert_pairs import co_routed_tokens, outputs_of_pairs, shared_sample
from smoe_train.routing.over_base import OverBaseConfig, RouterOverBase
from smoe_train.routing.registry import ROUTERS, register_router
from smoe_train.routing.router import Router
from smoe_train.routing.selection import router_dtype, select_top_k
from smoe_train.routing.top_k import TopKConfig

if TYPE_CHECKING:
    BaseRouterConfig = RouterConfig

LOSS = "similarity_loss"
NO_EXPERT = -1
RBF_ONLY = ("sigma", "sigma_mode", "max_tokens", "candidate_tokens")


class SimSmoeConfig(OverBaseConfig):
    """Options of SimSMoE."""

    type: Literal["sim_smoe"] = "sim_smoe"
    base: BaseRouterConfig = TopKConfig()
    """The policy that routes, with its own options."""
    similarity_coefficient: float = Field(0.01, ge=0.0)
    """Weight of the similarity loss (mean over MoE layers), independent of the load-balance coefficient; 0 switches it
    off, its value is still logged, of outputs that an untrained head projects."""
    frequency: float = Field(16.0, gt=0.0)
    """A pair of experts is checked when more tokens than this were sent to both since its last check."""
    frequency_unit: Literal["batch_fraction", "tokens"] = "batch_fraction"
    """Whether ``frequency`` is in tokens (the paper) or in global batches' worth of them (the released code)."""
    threshold: float = Field(0.5, ge=0.0)
    """A checked pair has collapsed if its debiased CKA is at least this; the paper recommends 0.3 to 0.7."""
    similarity: Literal["cka_linear", "cka_rbf"] = "cka_linear"
    """CKA with a linear kernel, exact over all shared tokens, or with a Gaussian kernel over some of them."""
    estimator: Estimator = "biased"
    """Estimator of the CKA that is minimised; the decision whether a pair has collapsed is always debiased, since the
    biased one exceeds 0.5 for independent experts with few shared tokens."""
    sigma: float = Field(0.8, gt=0.0)
    """``cka_rbf``: width of the kernel (0.8 to 0.9 in the paper)."""
    sigma_mode: SigmaMode = "median_fraction"
    """``cka_rbf``: whether ``sigma`` is a fraction of the median distance between tokens, or ``absolute`` as in the
    released code, which then depends on the scale of the outputs."""
    projection: Literal["none", "linear", "mlp"] = "linear"
    """Head between an expert's output and the CKA, one a layer for all experts: none, one matrix (the released code) or
    one hidden layer (the paper)."""
    projection_dim: int | None = Field(None, ge=1, le=1 << 20)
    """Width of the head's output, and of its hidden layer; the number of experts if not given."""
    max_pairs: int = Field(4, ge=1)
    """Most pairs that a layer checks in one step, those with the most shared tokens first."""
    min_tokens: int = Field(16, ge=LEAST_TOKENS)
    """Shared tokens below which a check has no outcome."""
    max_tokens: int = Field(256, ge=LEAST_TOKENS)
    """``cka_rbf``: shared tokens that the Gram matrices are made of at most; they hold the square of it."""
    candidate_tokens: int = Field(8192, ge=LEAST_TOKENS)
    """``cka_rbf``: evenly spaced tokens of the global batch, among which shared ones are looked for."""
    probe_second_expert: bool = False
    """With k = 1 no two experts see the same token: then counts each token's second choice, and runs it too, without
    weight, for the tokens of the pairs that are being checked."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """Pairs need two experts a token; options of another kernel have no effect."""
        found = [f"base: {problem}" for problem in self.base.problems(plan)]
        base = ROUTERS.get(self.base.type).router
        if base.selects_by_logits and max(plan.top_k_values) < 2 and not self.probe_second_expert:
            found.append("no two experts see the same token with k = 1; use k >= 2, or probe_second_expert: true")
        elif self.base.most_experts(max(plan.top_k_values)) < 2 and not self.probe_second_expert:
            found.append("no two experts see the same token with these options of base")
        if self.probe_second_expert and not base.selects_by_logits:
            found.append(f"probe_second_expert: the second choice of {self.base.type} is not that of its scores")
        elif self.probe_second_expert and 1 not in plan.top_k_values:
            found.append("probe_second_expert has no effect: k is never 1")
        if self.frequency_unit == "batch_fraction" and self.frequency >= plan.max_steps - 1:
            found.append(
                f"frequency: {self.frequency} batches' worth of shared tokens, and then a step for the check, are more "
                f"than training.max_steps {plan.max_steps} has; no pair is ever checked"
            )
        if self.similarity == "cka_rbf" and min(self.max_tokens, self.candidate_tokens) < self.min_tokens:
            found.append(
                f"max_tokens and candidate_tokens: fewer than min_tokens {self.min_tokens}: nothing is measured"
            )
        if plan.num_experts < 2:
            found.append("there are no pairs of experts with num_experts 1")
        if self.threshold > 1.0:
            found.append(f"threshold: no CKA reaches {self.threshold}; use at most 1")
        if self.projection == "none" and self.projection_dim is not None:
            found.append("projection_dim has no effect without a projection")
        if self.similarity == "cka_linear":
            found += [
                f"{name} has no effect with similarity: cka_linear"
                for name in RBF_ONLY
                if getattr(self, name) != type(self).model_fields[name].default
            ]
        return found

    def loss_coefficients(self) -> dict[str, float]:
        """Returns the base's coefficients and that of the similarity loss."""
        return {**super().loss_coefficients(), LOSS: self.similarity_coefficient}


class ProjectionHead(nn.Module):
    """``W y``, or ``W relu(U y + c)``; without an output bias, which CKA does not see.

    Args:
        width: Width of what is projected.
        out: Width of the projection and of the hidden layer.
        hidden: Whether there is a hidden layer.
    """

    def __init__(self, width: int, out: int, hidden: bool) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(out, width)) if hidden else None
        self.hidden_bias = nn.Parameter(torch.empty(out)) if hidden else None
        self.weight = nn.Parameter(torch.empty(out, out if hidden else width))

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, 1 / fan-in), bias 0."""
        with torch.no_grad():
            for name in ("hidden_weight", "weight"):
                parameter = getattr(self, name)
                if parameter is not None:
                    shape = tuple(parameter.shape)
                    parameter.copy_(draw.normal(f"head.{name}", shape, 1.0 / math.sqrt(shape[1])))
            if self.hidden_bias is not None:
                self.hidden_bias.zero_()

    def forward(self, y: Tensor) -> Tensor:
        """Returns the projection in the dtype of ``y``."""
        if self.hidden_weight is not None and self.hidden_bias is not None:
            y = F.relu(F.linear(y, self.hidden_weight.to(y.dtype), self.hidden_bias.to(y.dtype)))
        return F.linear(y, self.weight.to(y.dtype))


@register_router("sim_smoe", SimSmoeConfig)
class SimSmoeRouter(RouterOverBase):
    """Watches which experts a base policy chooses together, and separates those whose outputs have become alike.

    In each step the tokens that two experts share are counted. A pair with more than ``frequency`` of them is checked
    in the next step, by the CKA of both experts' projected outputs on the tokens they share in that step, over all
    ranks and micro-batches; if its debiased CKA is at least ``threshold``, its CKA is added to ``similarity_loss``.
    The outputs are those the layer has computed anyway, so with k >= 2 no expert runs more often.

    Source: arXiv 2406.15883 and its released code. Deviations: a pair that is due is checked in the next step (there in
    the same forward pass), at most ``max_pairs`` a step, so that no rank waits for its device; its counter is 0 after
    that step, whatever came of it (as there). ``batch_fraction`` compares a counter with ``frequency`` times the tokens
    of the present step, and counts steps, not micro-batches. The decision is debiased. The outputs are reused, so the
    gradient goes on into the layers below (there both experts run again, with ReLU whatever they have, on detached
    tokens). Pairs work for any k (there k = 2). The linear kernel is the default (there Gaussian of absolute width).
    Losses are averaged over MoE layers (there added up), and the coefficient is not multiplied by that of the load
    balance. On competing steps the winners are counted.
    """

    paper: ClassVar[str] = "arXiv 2406.15883 (SimSMoE)"
    summary: ClassVar[str] = "separates experts that are chosen together and have become alike (CKA), over any policy"
    loss_names: ClassVar[frozenset[str]] = frozenset({LOSS})
    batch_losses: ClassVar[frozenset[str]] = frozenset({LOSS})
    config: SimSmoeConfig
    co_routed_EE: Tensor
    due_P2: Tensor

    def __init__(self, config: SimSmoeConfig, shape: RouterShape, base: Router) -> None:
        super().__init__(config, shape, base)
        self.head: ProjectionHead | None = None
        self.width = shape.d_model
        if config.projection != "none":
            self.width = config.projection_dim or shape.num_experts
            self.head = ProjectionHead(shape.d_model, self.width, config.projection == "mlp")
            # Nothing trains it without a coefficient, and what is trainable should get a gradient.
            self.head.requires_grad_(config.similarity_coefficient > 0.0)
        num_experts = shape.num_experts
        num_pairs = max(min(config.max_pairs, num_experts * (num_experts - 1) // 2), 1)
        # Tokens that two experts shared since the pair's last check, above the diagonal; integers, as bf16 runs round.
        self.register_buffer("co_routed_EE", torch.zeros(num_experts, num_experts, dtype=torch.int64))
        self.register_buffer("due_P2", torch.full((num_pairs, 2), NO_EXPERT, dtype=torch.int64))

    def initialise(self, draw: Draw) -> None:
        """The base as it would be alone, the head from N(0, 1 / fan-in), nothing counted and nothing due."""
        self.base.initialise(draw)
        if self.head is not None:
            self.head.initialise(draw)
        with torch.no_grad():
            self.co_routed_EE.zero_()
            self.due_P2.fill_(NO_EXPERT)

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Returns the base's assignment; at k = 1, on request, with a slot without weight for the second choice."""
        assignment = self.base.assign(x_TD, token_ids_T, context)
        if not self._probes(context):
            return assignment
        first_T, second_T = assignment.expert_ids_TK[:, 0], _second_choice(assignment)
        low_T1, high_T1 = torch.minimum(first_T, second_T).unsqueeze(1), torch.maximum(first_T, second_T).unsqueeze(1)
        due_T = ((low_T1 == self.due_P2[:, 0]) & (high_T1 == self.due_P2[:, 1])).any(1) & (first_T != EMPTY_SLOT)
        probe_T1 = torch.where(due_T, second_T, EMPTY_SLOT).unsqueeze(1)
        return replace(
            assignment,
            expert_ids_TK=torch.cat([assignment.expert_ids_TK, probe_T1], 1),
            weights_TK=F.pad(assignment.weights_TK, (0, 1)),
        )

    def settle(self, assignment: Assignment, outcome: Outcome, context: Context) -> Assignment:
        """Returns the base's; there is nothing to probe where all experts have run."""
        return super().settle(self._of_base(assignment, context), outcome, context)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the base's losses."""
        return self.base.losses(self._of_base(assignment, context), context)

    def merge(self, assignment: Assignment, y_TKD: Tensor, context: Context) -> Merged:
        """Merges as the base does; in training adds the similarity loss and its counts.

        Stats: ``co_routed_EE`` (tokens that two experts share, above the diagonal) and, times the tokens, so that sums
        over ranks and micro-batches give means over steps, ``pairs_checked``, ``pairs_measured`` (with enough tokens),
        ``pairs_fired`` and the debiased CKA of those measured.
        """
        of_base = self._of_base(assignment, context)
        merged = self.base.merge(of_base, y_TKD[:, : of_base.expert_ids_TK.shape[1]], context)
        if not context.training:
            return merged
        with torch.autocast(y_TKD.device.type, enabled=False):
            loss, outcome = self._similarity_loss(assignment.expert_ids_TK, y_TKD.to(router_dtype(y_TKD)), context)
        counted_TK = assignment.expert_ids_TK
        if of_base is not assignment:
            second_T = torch.where(counted_TK[:, 0] != EMPTY_SLOT, _second_choice(of_base), EMPTY_SLOT)
            counted_TK = torch.stack([counted_TK[:, 0], second_T], 1)
        stats = {name: value.float() * merged.stats["tokens"] for name, value in outcome.items()}
        stats["co_routed_EE"] = co_routed_tokens(counted_TK, self.shape.num_experts)
        return replace(merged, losses={**merged.losses, LOSS: loss}, stats={**merged.stats, **stats})

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """The base's own, and the head by the similarity loss."""
        head = [] if self.head is None else self.head.named_parameters()
        return {**super().trained_by(context), LOSS: frozenset(f"head.{name}" for name, p in head if p.requires_grad)}

    def losses_reaching_experts(self, context: Context) -> frozenset[str]:
        """The base's, and the similarity loss."""
        return super().losses_reaching_experts(context) | {LOSS}

    @contextmanager
    def rehearsal(self, stats: Mapping[str, Tensor]) -> Iterator[None]:
        """Checks the pairs that share most tokens, and finds them alike: at first none is due."""
        due_P2 = self.due_P2.clone()
        pairs_P2, _ = self._most_shared(stats["co_routed_EE"])
        self.due_P2[: len(pairs_P2)] = pairs_P2
        try:
            with super().rehearsal(stats):
                yield
        finally:
            self.due_P2.copy_(due_P2)

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Counts the shared tokens of the step, forgets those of the checked pairs, and says which are due next."""
        self.base.after_step(stats)
        counts_EE = self.co_routed_EE
        counts_EE += stats["co_routed_EE"].round().to(counts_EE.dtype)
        checked_EE = torch.zeros_like(counts_EE)
        # Rows without a pair point at the diagonal, which is never counted.
        first_P, second_P = self.due_P2.clamp(min=0).unbind(1)
        checked_EE[first_P, second_P] = 1
        counts_EE.mul_(1 - checked_EE)
        limit = stats["tokens"].double() if self.config.frequency_unit == "batch_fraction" else 1.0
        exceeding_EE = torch.where(counts_EE.double() > self.config.frequency * limit, counts_EE, 0)
        pairs_P2, shared_P = self._most_shared(exceeding_EE)
        self.due_P2.fill_(NO_EXPERT)
        self.due_P2[: len(pairs_P2)] = torch.where(shared_P.unsqueeze(1) > 0, pairs_P2, NO_EXPERT)

    def _most_shared(self, counts_EE: Tensor) -> tuple[Tensor, Tensor]:
        """Returns as many pairs as a step checks, those with the highest counts, and these; ties by the lowest pair."""
        best = torch.sort(counts_EE.flatten(), descending=True, stable=True)
        places_P = best.indices[: len(self.due_P2)]
        num_experts = self.shape.num_experts
        return torch.stack([places_P // num_experts, places_P % num_experts], 1), best.values[: len(self.due_P2)]

    def _probes(self, context: Context) -> bool:
        return self.config.probe_second_expert and context.training and context.top_k == 1

    def _of_base(self, assignment: Assignment, context: Context) -> Assignment:
        """Takes off the slot that `assign` put on."""
        if not self._probes(context) or assignment.expert_ids_TK.shape[1] < 2:
            return assignment
        ids_TK, weights_TK = assignment.expert_ids_TK[:, :-1], assignment.weights_TK[:, :-1]
        return replace(assignment, expert_ids_TK=ids_TK, weights_TK=weights_TK)

    def _similarity_loss(self, ids_TK: Tensor, y_TKD: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the summed CKA of the pairs that are due and have collapsed, and what came of the checks.

        Which pairs are due, and which have collapsed, are masks: every step computes the same on every rank.
        """
        config = self.config
        z_TKW = y_TKD if self.head is None else self.head(y_TKD)
        x_PTW, y_PTW, shared_PT = outputs_of_pairs(z_TKW, ids_TK, self.due_P2)
        if config.similarity == "cka_linear":
            sums_PM = context.total("similarity_sums", linear_sums(x_PTW, y_PTW, shared_PT))
            decision, objective = (self._linear(sums_PM, one) for one in ("debiased", config.estimator))
        else:
            rows = shared_sample(x_PTW, y_PTW, shared_PT, context, config.candidate_tokens, config.max_tokens)
            decision, objective = (self._rbf(*rows, one) for one in ("debiased", config.estimator))
        collapsed_P = decision.value_P.detach() >= config.threshold
        if self.rehearsing:
            collapsed_P = torch.ones_like(collapsed_P)
        fired_P = collapsed_P & decision.defined_P & objective.defined_P
        loss = torch.where(fired_P, objective.value_P, 0.0).sum().to(y_TKD.dtype)
        return loss, {
            "pairs_checked": (self.due_P2[:, 0] != NO_EXPERT).sum(),
            "pairs_measured": decision.defined_P.sum(),
            "pairs_fired": fired_P.sum(),
            "pairs_cka/pairs_measured": decision.value_P.detach().sum(),
        }

    def _least_tokens(self) -> int:
        return LEAST_TOKENS if self.rehearsing else self.config.min_tokens

    def _linear(self, sums_PM: Tensor, estimator: Estimator) -> Similarity:
        return cka_linear(sums_PM, self.width, estimator, self._least_tokens())

    def _rbf(self, x_PNW: Tensor, y_PNW: Tensor, shared_PN: Tensor, estimator: Estimator) -> Similarity:
        config = self.config
        return cka_rbf(x_PNW, y_PNW, shared_PN, estimator, config.sigma, config.sigma_mode, self._least_tokens())


def _second_choice(assignment: Assignment) -> Tensor:
    """The best-scored expert of each token beside the first slot's [T]."""
    first_T1 = assignment.expert_ids_TK[:, :1].clamp(min=0)
    others_TE = assignment.logits_TE.detach().scatter(1, first_T1, -torch.inf)
    return select_top_k(others_TE, 1)[:, 0]
