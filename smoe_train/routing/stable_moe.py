"""StableMoE: a routing that is learned first, then distilled into a router of token ids and frozen (2204.08396)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.contract import Assignment, Context, Draw, RouterConfig, RouterPlan, RouterShape
from smoe_train.routing.losses import slots_per_expert
from smoe_train.routing.orthogonal import orthogonal
from smoe_train.routing.registry import register_router
from smoe_train.routing.router import Router
from smoe_train.routing.selection import router_dtype, select_top_k, without_padding

DistilledKind = Literal["word", "bigram", "convolution"]

CONVOLUTION_TAPS = 5
LOOKS_BACK: dict[DistilledKind, int] = {"word": 0, "bigram": 1, "convolution": CONVOLUTION_TAPS - 1}


class StableMoeConfig(RouterConfig):
    """Options of StableMoE."""

    when_loaded: ClassVar[Mapping[str, Any]] = {"stage_1_steps": 0}

    type: Literal["stable_moe"] = "stable_moe"
    stage_1_steps: int = Field(6000, ge=0)
    """Optimizer steps in which the routing is learned and distilled; from then on the distilled router decides and is
    frozen. An absolute number (the paper: 6000 of 60000 steps), so that a longer training does not move the switch. 0,
    which a run takes up with the pretrained router it loads, keeps to the distilled router from the start."""
    distilled: DistilledKind = "word"
    """What the distilled router sees: the token (``word``), the mean of the token and the one before (``bigram``), or
    the last five tokens (``convolution``). With a tokenizer of bytes, ``word`` is a table of 256 rows."""
    distilled_dim: int = Field(50, ge=1, le=1 << 20)
    """Width of the distilled router's embedding."""
    init_gain: float = Field(0.1, gt=0.0)
    """Length of the initial expert centroids, which are orthogonal."""
    stable_balance_coefficient: float = Field(0.3, ge=0.0)
    """Weight of the balance loss of stage 1 (the paper's loss, 0 at perfect balance)."""
    distillation_coefficient: float = Field(0.3, gt=0.0)
    """Weight of the distillation loss of stage 1, which alone trains the distilled router. The released code sums over
    tokens where this is a mean, as is the task loss beside it."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """A run that never reaches stage 2 trains another method; one without stage 1 needs what that learns."""
        if self.stage_1_steps == 0 and not plan.loaded:
            return [
                "stage_1_steps: 0 keeps to the distilled router, which nothing has trained: it needs a loaded one, "
                "by initialise.path with initialise.router: load"
            ]
        if self.stage_1_steps < plan.max_steps:
            return []
        return [
            f"stage_1_steps: training.max_steps {plan.max_steps} never reaches stage 2, which begins at step "
            f"{self.stage_1_steps}; the paper's share is a tenth of the training"
        ]

    def loss_coefficients(self) -> dict[str, float]:
        """Returns the coefficients of both losses of stage 1."""
        return {
            "stable_balance_loss": self.stable_balance_coefficient,
            "distillation_loss": self.distillation_coefficient,
        }


@dataclass(frozen=True)
class StableAssignment(Assignment):
    """An assignment of stage 1 with what the distilled router would have said.

    Attributes:
        distilled_logits_TE: Its scores; they carry gradient into the distilled router alone.
    """

    distilled_logits_TE: Tensor


class TokenIdRouter(nn.Module):
    """Scores experts from token ids alone: an embedding, perhaps of neighbours too, and centroids of its own.

    Args:
        kind: What it sees.
        dim: Width of the embedding.
        shape: Vocabulary and experts.
    """

    def __init__(self, kind: DistilledKind, dim: int, shape: RouterShape) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(shape.vocab_size, dim)
        self.taps = nn.Parameter(torch.empty(CONVOLUTION_TAPS, dim, dim)) if kind == "convolution" else None
        self.centroids = nn.Parameter(torch.empty(shape.num_experts, dim))

    def forward(self, token_ids_T: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """Returns scores [T, E]; each sequence starts afresh, and padding is as if it were not there."""
        length = context.sequence_length or max(token_ids_T.shape[0], 1)
        mask_T = context.token_mask_T
        if mask_T is None:
            mask_T = torch.ones_like(token_ids_T, dtype=torch.bool)
        real_BS1 = mask_T.view(-1, length, 1).to(dtype)
        ids_T = torch.where(mask_T, token_ids_T, torch.zeros_like(token_ids_T))
        embedded_BSC = self.embedding(ids_T.view(-1, length)).to(dtype) * real_BS1
        features_BSC = self._features(embedded_BSC, real_BS1)
        return F.linear(features_BSC.flatten(0, 1), self.centroids.to(dtype))

    def _features(self, embedded_BSC: Tensor, real_BS1: Tensor) -> Tensor:
        if self.kind == "word":
            return embedded_BSC
        if self.kind == "bigram":
            present_BS1 = (real_BS1 + _earlier(real_BS1, 1)).clamp(min=1.0)
            return (embedded_BSC + _earlier(embedded_BSC, 1)) / present_BS1
        assert self.taps is not None
        taps = self.taps.to(embedded_BSC.dtype)
        seen = [F.linear(_earlier(embedded_BSC, lag), taps[lag]) for lag in range(CONVOLUTION_TAPS)]
        return torch.stack(seen).sum(dim=0)


@register_router("stable_moe", StableMoeConfig)
class StableMoeRouter(Router):
    """Learns a routing, distils it into token ids, then keeps it fixed.

    Stage 1 (steps before ``stage_1_steps``): scores ``s_i = E_i . h`` with trained centroids E decide, the k best
    experts are weighed by ``sigmoid(s_i)``, and a router of token ids learns to say what they decided. Stage 2: that
    router, frozen, decides; the weights are still ``sigmoid(E_i . h)`` with E trained on, and both losses are 0.

    The stage is a function of `Context.step`. Evaluation in stage 1 uses the learned routing, what training uses at
    that step; a model that is called without a step is in stage 2. ``logits_TE`` are the scores that decide.

    Losses of stage 1, over A_i the slots of expert i, with f_i their share of all slots:
    ``stable_balance_loss = mean over slots of (E f_i - 1) sigmoid(s_i)``, 0 at perfect balance;
    ``distillation_loss = mean over tokens of CE(distilled scores, assignment)``, the assignment without gradient.

    Source: arXiv 2204.08396, section 3 and its released code (``BaseLayer``). Deviations:
    the balance loss ``sum_i (|A_i| - n) / n sum_{t in A_i} sigmoid(s_ti)`` is divided by the number of slots (and its
    n counts the whole step), the distillation loss by the number of tokens; any k (the paper: 1), where the
    distillation loss is the mean over the k experts; dropless (the paper: capacity factor 2); the output is the
    weighted sum of the paper's equation (the released code mixes ``a E(x) + (1 - a) x``); the convolution sees
    earlier tokens alone (there both sides); validation in stage 1 uses the learned routing (there the distilled
    one); the frozen router is kept to the bit (there Adam's moments may still move it); no Transformer as distilled
    router; the embedding starts at N(0, 1) and the taps at N(0, 1 / (5 dim)).
    """

    loss_names: ClassVar[frozenset[str]] = frozenset({"stable_balance_loss", "distillation_loss"})
    batch_losses: ClassVar[frozenset[str]] = frozenset({"stable_balance_loss"})
    paper: ClassVar[str] = "arXiv 2204.08396 (StableMoE)"
    summary: ClassVar[str] = "a learned routing is distilled into token ids, then frozen; the weights train on"
    config: StableMoeConfig

    def __init__(self, config: StableMoeConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.centroids = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))
        self.distilled = TokenIdRouter(config.distilled, config.distilled_dim, shape)
        self.looks_back_tokens = LOOKS_BACK[config.distilled]

    def initialise(self, draw: Draw) -> None:
        """Orthogonal centroids of length ``init_gain``, embedding and taps from normal distributions."""
        gain, distilled = self.config.init_gain, self.distilled
        with torch.no_grad():
            for name, centroids in (("centroids", self.centroids), ("distilled.centroids", distilled.centroids)):
                centroids.copy_(gain * orthogonal(draw.normal(name, tuple(centroids.shape), 1.0)))
            table = distilled.embedding.weight
            table.copy_(draw.normal("distilled.embedding", tuple(table.shape), 1.0))
            if distilled.taps is not None:
                std = (CONVOLUTION_TAPS * self.config.distilled_dim) ** -0.5
                distilled.taps.copy_(draw.normal("distilled.taps", tuple(distilled.taps.shape), std))

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Selects experts by the learned scores in stage 1, by the distilled ones in stage 2."""
        dtype = router_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.to(dtype), self.centroids.to(dtype))
            if self.frozen(context.step):
                with torch.no_grad():
                    deciding_TE = self.distilled(token_ids_T, context, dtype)
            else:
                deciding_TE, distilled_TE = scores_TE, self.distilled(token_ids_T, context, dtype)
            expert_ids_TK = select_top_k(deciding_TE, context.top_k)
            weights_TK = torch.sigmoid(scores_TE.gather(1, expert_ids_TK))
        expert_ids_TK, weights_TK = without_padding(expert_ids_TK, weights_TK, context.token_mask_T)
        if self.frozen(context.step):
            return Assignment(expert_ids_TK, weights_TK, deciding_TE)
        return StableAssignment(expert_ids_TK, weights_TK, deciding_TE, distilled_TE)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns both losses of stage 1; in stage 2 they are exactly 0."""
        if not isinstance(assignment, StableAssignment):
            zero = torch.zeros((), dtype=assignment.weights_TK.dtype, device=assignment.weights_TK.device)
            return {"stable_balance_loss": zero, "distillation_loss": self._zero_gradient(zero, context)}
        # Slot by slot, so that padding, whose weight is 0, and empty slots fall away.
        chosen_TK = assignment.expert_ids_TK.clamp(min=0)
        slots_E = context.total("slots_E", slots_per_expert(assignment.expert_ids_TK, self.shape.num_experts))
        slots_E = slots_E.to(assignment.weights_TK.dtype)
        excess_E = self.shape.num_experts * slots_E / slots_E.sum().clamp(min=1.0) - 1.0
        log_p_TE = torch.log_softmax(assignment.distilled_logits_TE, dim=-1)
        return {
            "stable_balance_loss": context.token_mean((excess_E[chosen_TK] * assignment.weights_TK).mean(dim=1)),
            "distillation_loss": context.token_mean(-log_p_TE.gather(1, chosen_TK).mean(dim=1)),
        }

    def _zero_gradient(self, zero: Tensor, context: Context) -> Tensor:
        """Returns 0 with a gradient of 0 to the frozen router: engines expect one for what their optimizer holds."""
        if not context.training:
            return zero
        return zero + sum((0.0 * parameter.sum().to(zero.dtype) for parameter in self.distilled.parameters()), zero)

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """The task trains the centroids; stage 1's losses train these and the distilled router, never both."""
        learning = not self.frozen(context.step)
        own = frozenset(f"distilled.{name}" for name, _ in self.distilled.named_parameters())
        return {
            "task": frozenset({"centroids"}),
            "stable_balance_loss": frozenset({"centroids"}) if learning else frozenset(),
            "distillation_loss": own if learning else frozenset(),
        }

    def late_frozen(self) -> list[nn.Parameter]:
        """Returns the distilled router's parameters."""
        return list(self.distilled.parameters())

    def frozen(self, step: int) -> bool:
        """Returns whether a step is in stage 2."""
        return step >= self.config.stage_1_steps


def _earlier(values_BSC: Tensor, lag: int) -> Tensor:
    """Returns what each position had ``lag`` positions before, zero at the beginning of a sequence."""
    return F.pad(values_BSC, (0, 0, lag, 0))[:, : values_BSC.shape[1]]
