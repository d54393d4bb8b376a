"""The data of the router contract: what goes into `Router.assign` and `Router.merge` and what comes out.

Shape suffixes: T tokens of this rank (B * S), D d_model, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from smoe_train.config import StrictModel

EMPTY_SLOT = -1


class RouterConfig(StrictModel):
    """Options of one routing policy; subclasses add a ``type`` literal, the tag of the recipe's union."""

    type: str

    def problems(self, top_k_values: frozenset[int], num_experts: int) -> list[str]:
        """Returns what makes these options impossible with the k values that training will use."""
        return []


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
        competing: Whether this layer lets all experts compete in this step (CompeteSMoE).
        token_mask_T: True for real tokens; None if all are real. Padding is routed nowhere and counts nowhere.
        token_index_T: int64, index of each token within the global batch of the step.
        tokens_per_rank: Real tokens of this pass, averaged over the ranks (0-dim fp32); None if it is T everywhere.
        sum_over_ranks: Adds a detached tensor up over all data-parallel ranks.
        num_ranks: Number of data-parallel ranks.
    """

    step: int
    layer: int
    top_k: int
    training: bool
    seed: int = 0
    competing: bool = False
    token_mask_T: Tensor | None = None
    token_index_T: Tensor | None = None
    tokens_per_rank: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank
    num_ranks: int = 1

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
    """

    out_TD: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
