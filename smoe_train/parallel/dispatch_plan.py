"""Sorting tokens by expert and back: pure index arithmetic and two gathers, no communication.

Rows sorted by expert let one grouped product per projection serve all experts. Both directions are gathers in the
forward and in the backward pass (a scatter-add would be slower and, on accelerators, not deterministic).
Shape suffixes: T tokens, K slots a token, N = T * K slots, R rows of the sorted buffer, D d_model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# oneDNN builds a new primitive for each new row count of a bf16 product, which costs more than the product;
# rounding rows up to a multiple makes the counts repeat. fp32 products (MKL) and accelerators do not need it.
CPU_LOW_PRECISION_ROWS = 32

Experts = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DispatchPlan:
    """Where each slot's token goes in the buffer sorted by expert.

    Attributes:
        row_of_slot_TK: int64, row of the sorted buffer; empty slots point behind the last expert's rows.
        valid_TK: False in empty slots.
        rows_per_expert_E: int64, rows of each expert, rounded up to the row multiple.
        num_rows: R, rows of the sorted buffer: N + E * (multiple - 1), a size that needs no look at the data.
    """

    row_of_slot_TK: Tensor
    valid_TK: Tensor
    rows_per_expert_E: Tensor
    num_rows: int


def row_multiple(x: Tensor) -> int:
    """Returns what to round each expert's rows up to."""
    return CPU_LOW_PRECISION_ROWS if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else 1


def plan_dispatch(expert_ids_TK: Tensor, num_experts: int, multiple: int = 1) -> DispatchPlan:
    """Plans the sort by expert; among one expert's rows the order of tokens is kept.

    Args:
        expert_ids_TK: int64 ids in [0, num_experts), or negative for an empty slot.
        num_experts: E.
        multiple: Each expert's rows are rounded up to a multiple of this.
    """
    ids_N = expert_ids_TK.reshape(-1)
    num_slots, device = ids_N.numel(), ids_N.device
    valid_N = ids_N >= 0
    bins_N = torch.where(valid_N, ids_N, num_experts)
    sorted_bins_N, slot_of_rank_N = torch.sort(bins_N, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.index_add_(0, bins_N, torch.ones_like(bins_N))
    rows = counts.clone()
    rows[:num_experts] = (counts[:num_experts] + multiple - 1) // multiple * multiple
    first_rank = torch.cumsum(counts, 0) - counts
    first_row = torch.cumsum(rows, 0) - rows
    rank_N = torch.arange(num_slots, device=device)
    row_of_rank_N = first_row[sorted_bins_N] + rank_N - first_rank[sorted_bins_N]
    row_of_slot_N = torch.empty_like(bins_N).scatter_(0, slot_of_rank_N, row_of_rank_N)
    return DispatchPlan(
        row_of_slot_TK=row_of_slot_N.view(expert_ids_TK.shape),
        valid_TK=valid_N.view(expert_ids_TK.shape),
        rows_per_expert_E=rows[:num_experts],
        num_rows=num_slots + num_experts * (multiple - 1),
    )


class _Permute(torch.autograd.Function):
    """x_TD -> sorted rows x_RD; rows that no slot owns are zero."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_slot_TK: Tensor, num_rows: int) -> Tensor:
        num_tokens, slots = row_of_slot_TK.shape
        ctx.save_for_backward(row_of_slot_TK)
        token_of_row_R = torch.full((num_rows,), num_tokens, dtype=torch.int64, device=x_TD.device)
        tokens_N = torch.arange(num_tokens, device=x_TD.device).repeat_interleave(slots)
        token_of_row_R.scatter_(0, row_of_slot_TK.reshape(-1), tokens_N)
        if num_rows == num_tokens * slots:
            return x_TD.index_select(0, token_of_row_R)
        padded = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])
        return padded.index_select(0, token_of_row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot_TK,) = ctx.saved_tensors
        grad_TKD = grads[0].index_select(0, row_of_slot_TK.reshape(-1)).view(*row_of_slot_TK.shape, -1)
        return grad_TKD.sum(dim=1) if row_of_slot_TK.shape[1] != 1 else grad_TKD.squeeze(1), None, None


class _Unpermute(torch.autograd.Function):
    """Sorted rows y_RD -> y_TKD in slot order."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot_TK)
        ctx.num_rows = y_RD.shape[0]
        return y_RD.index_select(0, row_of_slot_TK.reshape(-1)).view(*row_of_slot_TK.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (row_of_slot_TK,) = ctx.saved_tensors
        grad_ND = grads[0].reshape(row_of_slot_TK.numel(), -1)
        slot_of_row_R = torch.full((ctx.num_rows,), grad_ND.shape[0], dtype=torch.int64, device=grad_ND.device)
        slots_N = torch.arange(grad_ND.shape[0], device=grad_ND.device)
        slot_of_row_R.scatter_(0, row_of_slot_TK.reshape(-1), slots_N)
        if ctx.num_rows != grad_ND.shape[0]:
            grad_ND = torch.cat([grad_ND, grad_ND.new_zeros(1, grad_ND.shape[1])])
        return grad_ND.index_select(0, slot_of_row_R), None


def to_expert_order(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token into the rows of its experts: [R, D], zero in rows of padding."""
    result: Tensor = _Permute.apply(x_TD, plan.row_of_slot_TK, plan.num_rows)  # type: ignore[no-untyped-call]
    return result


def to_slot_order(y_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """Brings expert outputs back to their tokens: [T, K, D], zero in empty slots."""
    y_TKD: Tensor = _Unpermute.apply(y_RD, plan.row_of_slot_TK)  # type: ignore[no-untyped-call]
    # Rows behind the last expert are undefined, so they are replaced, never multiplied by 0. Looking first costs a
    # host synchronisation on an accelerator, the replacement a pass over the outputs.
    if y_RD.device.type != "cpu" or not bool(plan.valid_TK.all()):
        y_TKD = torch.where(plan.valid_TK.unsqueeze(-1), y_TKD, torch.zeros((), dtype=y_RD.dtype, device=y_RD.device))
    return y_TKD


def run_experts(experts: Experts, x_TD: Tensor, expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Runs stacked experts on tokens and returns their uncombined outputs.

    Args:
        experts: Maps (rows sorted by expert [R, D], int64 rows of each expert [E]) to outputs [R, D].
        x_TD: Tokens.
        expert_ids_TK: int64 indices into the stacked experts, negative for an empty slot.
        num_experts: Number of stacked experts.
    """
    plan = plan_dispatch(expert_ids_TK, num_experts, row_multiple(x_TD))
    return to_slot_order(experts(to_expert_order(x_TD, plan), plan.rows_per_expert_E), plan)
