"""The data of the router contract: what goes into `Router.assign` and `Router.merge` and what comes out.

Shape suffixes: T tokens of this rank (B * S), D d_model, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from smoe_train.config import StrictModel

EMPTY_SLOT = -1


@dataclass(frozen=True)
class RouterPlan:
    """What training will ask of a router.

    Attributes:
        top_k_values: Every k that training will use.
        num_experts: E.
        max_steps: Optimizer steps of training.
        causal: Whether tokens must not depend on later ones.
        loaded: Whether the router begins with the weights of another training.
    """

    top_k_values: frozenset[int]
    num_experts: int
    max_steps: int
    causal: bool = True
    loaded: bool = False


class RouterConfig(StrictModel):
    """Options of one routing policy; subclasses add a ``type`` literal, the tag of the recipe's union.

    Attributes:
        when_loaded: Options that speak of one training rather than of the weights, by name, with their values in a run
            that loads the router of another; it may set them otherwise.
    """

    when_loaded: ClassVar[Mapping[str, Any]] = {}

    type: str

    def problems(self, plan: RouterPlan) -> list[str]:
        """Returns what makes these options impossible, or without effect, in the training that is planned."""
        return []

    def loss_coefficients(self) -> dict[str, float]:
        """Returns the coefficients of the policy's own losses; those of the losses all share are the model's."""
        return {}

    def competes(self) -> bool:
        """Returns whether experts compete for tokens, in the layers and steps that the curriculum says."""
        return False

    def most_experts(self, top_k: int) -> int:
        """Returns how many experts a token can have at most."""
        return top_k

    def has_threshold(self) -> bool:
        """Returns whether the policy has a threshold that the curriculum can schedule."""
        return False

    def varies_experts(self) -> bool:
        """Returns whether tokens of one pass may visit different numbers of experts."""
        return False


class Draw(Protocol):
    """Initial values from a generator keyed by (run seed, parameter name): independent of order, rank and EP size."""

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Returns fp32 CPU values from N(0, std^2)."""
        ...


@dataclass(frozen=True)
class RouterShape:
    """What a router has to know of the model around it."""

    d_model: int
    num_experts: int
    vocab_size: int


def same_on_one_rank(values: Tensor) -> Tensor:
    """The sum over ranks where there is one rank."""
    return values


@dataclass(frozen=True)
class Context:
    """What the trainer decides for one MoE layer in one forward pass, the same on every rank.

    Attributes:
        step: Optimizer step, counted from 0; micro-batches and recomputations of a step agree.
        layer: Index of the transformer layer.
        top_k: Experts a token in this pass.
        training: Whether this is a training pass.
        seed: Run seed, the key of every decision that looks random.
        threshold: What the curriculum sets a policy's threshold to; None leaves the policy's own option.
        competing: Whether this layer lets all experts compete in this step (CompeteSMoE).
        sequence_length: Consecutive tokens that are one sequence (T is a multiple of it); None if T tokens are one.
        token_mask_T: True for real tokens; None if all are real. Padding is routed nowhere and counts nowhere.
        token_index_T: int64, index of each token within the global batch of the step.
        tokens_per_rank: Real tokens, averaged over the ranks (0-dim fp32), and over the step's micro-batches where that
            is known; None if it is T everywhere.
        sum_over_ranks: Adds a detached tensor up over all data-parallel ranks.
        num_ranks: Number of data-parallel ranks.
        step_totals: Sums over all micro-batches of the step, if they are known or being collected.
    """

    step: int
    layer: int
    top_k: int
    training: bool
    seed: int = 0
    threshold: float | None = None
    competing: bool = False
    sequence_length: int | None = None
    token_mask_T: Tensor | None = None
    token_index_T: Tensor | None = None
    tokens_per_rank: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank
    num_ranks: int = 1
    step_totals: StepTotals | None = None

    def total(self, name: str, local: Tensor) -> Tensor:
        """Returns the sum of a tensor over everything that one optimizer step's losses are defined on.

        That is all ranks and, where `step_totals` knows them, all micro-batches. A loss that is not a mean over tokens
        must be a function of such totals: it is then the loss of the whole batch, however that was cut. The gradient
        flows into ``local`` alone, scaled so that its mean over ranks and micro-batches, which training takes, is the
        gradient of the total.

        Args:
            name: What is summed; the same on all ranks and in all micro-batches, different within a layer.
            local: The sum over this rank's tokens of this micro-batch.
        """
        if self.step_totals is None:
            total, parts = self.sum_over_ranks(local.detach()), self.num_ranks
        else:
            total = self.step_totals.total((self.layer, name), local.detach(), self.sum_over_ranks)
            parts = self.num_ranks * self.step_totals.num_micro_batches
        return total + parts * (local - local.detach()) if local.requires_grad else total

    def token_mean(self, values_T: Tensor) -> Tensor:
        """Returns the mean over real tokens such that the mean of the results over ranks is the global mean."""
        if self.token_mask_T is not None:
            values_T = torch.where(self.token_mask_T, values_T, torch.zeros_like(values_T))
        return values_T.sum() / self.count(values_T)

    def count(self, values_T: Tensor) -> Tensor | int:
        """Returns the number of real tokens a rank, at least 1 where it is counted."""
        if self.tokens_per_rank is not None:
            return self.tokens_per_rank.clamp(min=1.0 / self.num_ranks)
        if self.token_mask_T is not None:
            return self.token_mask_T.sum().clamp(min=1)
        return max(values_T.shape[0], 1)


class StepTotals:
    """Sums over the micro-batches of one optimizer step, collected in a pass without gradients before the step.

    In the first pass `total` adds up what it is given; after `finish` it returns the sums, without communication.

    Args:
        num_micro_batches: Micro-batches of a rank in the step.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._collecting = True

    def total(self, key: tuple[int, str], local: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the sum over ranks and, in the second pass, over micro-batches."""
        if not self._collecting:
            return self._sums[key]
        summed = sum_over_ranks(local)
        self._sums[key] = self._sums[key] + summed if key in self._sums else summed
        return summed

    def finish(self) -> None:
        """Ends the first pass."""
        self._collecting = False


@dataclass(frozen=True)
class Contest:
    """How the experts of a layer compete for its tokens; the bank holds it, wherever the experts live.

    Attributes:
        respond: Expert outputs [R, D] to responses [R], fp32 or wider, differentiable.
        choose: Responses [T, E] of some of the tokens, and which of them these are, to the ids [T, K] of the winners,
            best first, `EMPTY_SLOT` for padding; without gradient.
        chunk_tokens: Tokens of a rank that compete at once; None for all.
    """

    respond: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor, slice], Tensor]
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a contest ended with.

    Attributes:
        responses_TE: The experts' responses, with gradient into experts and tokens.
        expert_ids_TK: int64 winners; `EMPTY_SLOT` for padding.
        y_TKD: The winners' uncombined outputs, from the contest itself; zero in empty slots.
    """

    responses_TE: Tensor
    expert_ids_TK: Tensor
    y_TKD: Tensor


@dataclass(frozen=True)
class Assignment:
    """Which experts each token visits.

    Attributes:
        expert_ids_TK: int64, global expert ids; `EMPTY_SLOT` marks a slot that is not used.
        weights_TK: fp32 combination weights, 0 in empty slots; they carry the router's gradient.
        logits_TE: fp32 scores over all experts before selection.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor


@dataclass(frozen=True)
class Merged:
    """What an MoE layer returns.

    Attributes:
        out_TD: Combined expert outputs, zero for padding.
        losses: Auxiliary losses by name: 0-dim fp32, averaged over tokens, without their coefficient.
        stats: Detached tensors by name that add up over micro-batches and ranks.
        experts_of_token_T: int64, how many experts each token visited.
    """

    out_TD: Tensor
    experts_of_token_T: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
