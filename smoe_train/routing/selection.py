"""Choosing k experts a token, with ties broken by expert index, and turning scores into weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smoe_train.routing.contract import EMPTY_SLOT

SoftmaxPlace = Literal["after_top_k", "before_top_k", "before_top_k_renormalised"]


def router_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of router arithmetic for an input: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def select_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns the int64 ids [T, K] of the highest scores, best first; among equal scores the lower id wins.

    ``torch.topk`` leaves the order of ties open, which differs between devices; a stable sort does not.
    """
    return torch.sort(scores_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]


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
