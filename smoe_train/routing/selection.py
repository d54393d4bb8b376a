"""Choosing k experts a token, with ties broken by expert index, and turning scores into weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smoe_train.routing.contract import EMPTY_SLOT

SoftmaxPlace = Literal["after_top_k", "before_top_k", "before_top_k_renormalised"]

SORT_SHARE = 4  # a sort is faster where more than one expert in so many is selected


def router_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of router arithmetic for an input: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def select_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns the int64 ids [T, K] of the highest scores, best first; among equal scores the lower id wins.

    ``torch.topk`` leaves the order of ties open, which differs between devices; a stable sort does not, and neither
    does taking the first maximum k times, which is faster where k is small: 11 times for 2 of 64 experts on a CPU.
    """
    scores_TE = scores_TE.detach()
    if top_k * SORT_SHARE > scores_TE.shape[1]:
        return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    # What is taken is lower than anything that is left.
    left_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).min)
    taken = []
    for _ in range(top_k):
        taken.append(left_TE.max(dim=-1, keepdim=True).indices)
        left_TE.scatter_(1, taken[-1], float("-inf"))
    return torch.cat(taken, dim=1)


def two_highest(values_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the highest and the second highest [T] of values that are not negative, 0 for want of a second."""
    best = values_TE.max(dim=-1, keepdim=True)
    return best.values.squeeze(1), values_TE.scatter(1, best.indices, 0.0).max(dim=-1).values


def combination_weights(logits_TE: Tensor, expert_ids_TK: Tensor, softmax: SoftmaxPlace) -> Tensor:
    """Returns the weights [T, K] of the selected experts.

    Args:
        logits_TE: Scores over all experts.
        expert_ids_TK: Selected ids, all valid.
        softmax: ``after_top_k``: softmax over the selected scores (sums to 1; no gradient to the router at k = 1);
            ``before_top_k``: the full softmax's probabilities as they are (Switch); ``before_top_k_renormalised``:
            those divided by their sum, equal to ``after_top_k`` up to rounding.
    """
    if softmax == "after_top_k":
        return torch.softmax(logits_TE.gather(1, expert_ids_TK), dim=-1)
    weights_TK = torch.softmax(logits_TE, dim=-1).gather(1, expert_ids_TK)
    if softmax == "before_top_k_renormalised":
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK


def without_padding(expert_ids_TK: Tensor, weights_TK: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Empties the slots of padding tokens."""
    if token_mask_T is None:
        return expert_ids_TK, weights_TK
    real_T1 = token_mask_T.unsqueeze(1)
    return (
        torch.where(real_T1, expert_ids_TK, EMPTY_SLOT),
        torch.where(real_T1, weights_TK, torch.zeros((), dtype=weights_TK.dtype, device=weights_TK.device)),
    )
