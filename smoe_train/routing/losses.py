"""Auxiliary losses and statistics that every policy shares; one formula each, for any k and any EP size."""

from __future__ import annotations

import torch
from torch import Tensor

from smoe_train.routing.contract import EMPTY_SLOT, Assignment, Context
from smoe_train.routing.selection import two_highest


def slots_per_expert(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Returns how many slots each expert received, fp32 [E]; empty slots are not counted.

    Adding into a table of fixed size keeps this free of a host synchronisation (``bincount`` is not).
    """
    ids = expert_ids_TK.reshape(-1)
    valid = ids != EMPTY_SLOT
    table = torch.zeros(num_experts, dtype=torch.float32, device=ids.device)
    return table.index_add_(0, ids.clamp(min=0), valid.to(torch.float32))


def load_balance_loss(assignment: Assignment, context: Context) -> Tensor:
    """Load balance ``N * sum_i f_i * P_i`` over the tokens of a step on all ranks (0-dim fp32).

    ``f_i`` is expert i's share of the routed slots and carries no gradient; ``P_i`` is its mean full-softmax
    probability. The value is 1 at perfect balance and N at collapse onto one expert with one-hot probabilities, for
    any k and any number of ranks and micro-batches: the counts are `Context.total`, and the mean of the results over
    ranks and micro-batches is the value of the concatenated batch.

    Source: GShard (arXiv 2006.16668), Switch (arXiv 2101.03961, eq. 4). Deviations: f counts all k slots, not the
    first choice only, and is divided by the number of slots, so that the optimum does not depend on k; Switch's
    factor alpha is applied by the trainer.
    """
    num_experts = assignment.logits_TE.shape[1]
    slots_E = context.total("slots_E", slots_per_expert(assignment.expert_ids_TK, num_experts))
    share_E = _share(slots_E.to(assignment.logits_TE.dtype))
    probabilities_TE = torch.softmax(assignment.logits_TE, dim=-1)
    return context.token_mean(num_experts * (probabilities_TE * share_E).sum(dim=-1))


def z_loss(assignment: Assignment, context: Context) -> Tensor:
    """Router z-loss ``mean_t (logsumexp_i z_ti)^2`` (0-dim fp32); source: ST-MoE (arXiv 2202.08906, eq. 5)."""
    return context.token_mean(torch.logsumexp(assignment.logits_TE, dim=-1).square())


def routing_stats(assignment: Assignment, context: Context) -> dict[str, Tensor]:
    """Returns detached sums that describe the routing; all add up over micro-batches and ranks.

    Keys: ``slots_E`` (slots an expert received), ``probability_E`` (sum of full-softmax probabilities), ``tokens``
    (real tokens), ``two_expert_tokens`` (those with two experts or more), ``entropy`` (sum of the tokens' router
    entropies, nats) and ``margin`` (sum of p_first - p_second).
    """
    with torch.no_grad():
        logits_TE = assignment.logits_TE
        num_tokens = logits_TE.shape[0]
        log_p_TE = torch.log_softmax(logits_TE, dim=-1)
        p_TE = log_p_TE.exp()
        entropy_T = -(p_TE * log_p_TE).sum(dim=-1)
        best_T, second_T = two_highest(p_TE)
        margin_T = best_T - second_T
        tokens = torch.full((), float(num_tokens), device=logits_TE.device)
        if context.token_mask_T is not None:
            real_T = context.token_mask_T.to(p_TE.dtype)
            p_TE, entropy_T, margin_T = p_TE * real_T.unsqueeze(1), entropy_T * real_T, margin_T * real_T
            tokens = real_T.sum()
        return {
            "slots_E": slots_per_expert(assignment.expert_ids_TK, logits_TE.shape[1]),
            "probability_E": p_TE.sum(dim=0).float(),
            "tokens": tokens.float(),
            "two_expert_tokens": ((assignment.expert_ids_TK != EMPTY_SLOT).sum(dim=1) >= 2).sum().float(),
            "entropy": entropy_T.sum().float(),
            "margin": margin_T.sum().float(),
        }


def _share(slots_E: Tensor) -> Tensor:
    return slots_E / slots_E.sum().clamp(min=1.0)
