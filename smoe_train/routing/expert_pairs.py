"""Experts that see the same tokens: how many, with which outputs, and a sample of them that all ranks agree on.

Shape suffixes: T tokens, K slots, E experts, P pairs, W width of an output, N sampled rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smoe_train.routing.contract import EMPTY_SLOT, Context


def co_routed_tokens(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Returns how many tokens each two experts share, fp32 [E, E] above the diagonal; empty slots are not counted."""
    member_TE = torch.zeros(ids_TK.shape[0], num_experts + 1, device=ids_TK.device)
    member_TE = member_TE.scatter_(1, torch.where(ids_TK == EMPTY_SLOT, num_experts, ids_TK), 1.0)[:, :num_experts]
    with torch.autocast(ids_TK.device.type, enabled=False):
        return (member_TE.T @ member_TE).triu(diagonal=1)


def outputs_of_pairs(z_TKW: Tensor, ids_TK: Tensor, pairs_P2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both experts' outputs [P, T, W] for each pair, zero for tokens they do not share, and which they share.

    Args:
        z_TKW: Outputs by slot.
        ids_TK: Experts by slot, `EMPTY_SLOT` for none.
        pairs_P2: Pairs of experts; negative for none.
    """
    slot_P2TK = (pairs_P2[:, :, None, None] == ids_TK) & (pairs_P2 >= 0)[:, :, None, None]
    shared_PT = slot_P2TK.any(-1).all(1)
    chosen_P2TK = (slot_P2TK & shared_PT[:, None, :, None]).to(z_TKW.dtype)
    outputs_P2TW = torch.einsum("pstk,tkw->pstw", chosen_P2TK, z_TKW)
    return outputs_P2TW[:, 0], outputs_P2TW[:, 1], shared_PT


def shared_sample(
    x_PTW: Tensor, y_PTW: Tensor, shared_PT: Tensor, context: Context, candidates: int, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the outputs [P, N, W] of the same shared tokens on every rank, and which of the rows [P, N] hold one.

    Every ``stride``-th token of the global batch has a place in a table that is summed over ranks and micro-batches;
    the first ``max_tokens`` places that hold a shared token are used. All ranks and micro-batches have T tokens, so the
    global batch has ``T * num_ranks * num_micro_batches``. Without totals of the step, the batch is one micro-batch of
    all ranks, whose token indices are consecutive. The gradient flows into the own rows.

    Args:
        x_PTW: Outputs of each pair's first expert, zero for tokens that are not shared.
        y_PTW: Those of its second one.
        shared_PT: Which tokens are shared.
        context: The decisions for this pass.
        candidates: Places of the table at most.
        max_tokens: N at most.
    """
    num_tokens = shared_PT.shape[1]
    micro_batches = 1 if context.step_totals is None else context.step_totals.num_micro_batches
    total_tokens = max(num_tokens * context.num_ranks * micro_batches, 1)
    stride = math.ceil(total_tokens / candidates)
    num_places = math.ceil(total_tokens / stride)
    index_T = context.token_index_T
    if index_T is None:
        index_T = torch.arange(num_tokens, device=shared_PT.device)
    index_T = index_T % total_tokens
    place_T = torch.where(index_T % stride == 0, index_T // stride, num_places)  # the last place is thrown away
    rows_PTC = torch.cat([x_PTW, y_PTW, shared_PT.unsqueeze(2).to(x_PTW.dtype)], 2)
    table = rows_PTC.new_zeros(rows_PTC.shape[0], num_places + 1, rows_PTC.shape[2])
    table = context.total("shared_rows", table.index_add(1, place_T, rows_PTC)[:, :num_places])
    shared_PN = table[:, :, -1].detach() == 1
    order_PN = torch.argsort(shared_PN.int(), dim=1, descending=True, stable=True)[:, :max_tokens]
    rows_PNC = table.gather(1, order_PN.unsqueeze(2).expand(-1, -1, table.shape[2]))
    width = x_PTW.shape[2]
    return rows_PNC[..., :width], rows_PNC[..., width:-1], shared_PN.gather(1, order_PN)
