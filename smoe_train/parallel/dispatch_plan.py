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


@dataclass(frozen=True)
class DispatchPlan:
    """Where each slot's token goes in the buffer sorted by expert.

    Attributes:
        row_of_slot_TK: int64, row of the sorted buffer. Empty slots have no row: where sizes are known exactly, on the
            CPU, they hold ``num_rows``; elsewhere a row behind the last expert's.
        valid_TK: False in empty slots.
        rows_per_expert_E: int64, rows of each expert, rounded up to the row multiple.
        num_rows: R, rows of the sorted buffer: on the CPU as many as the experts have, elsewhere
            N + E * (multiple - 1), which needs no look at the data.
    """

    row_of_slot_TK: Tensor
    valid_TK: Tensor
    rows_per_expert_E: Tensor
    num_rows: int

    def rows_to_run(self) -> Tensor:
        """Returns int64 rows of each expert that add up to ``num_rows``.

        What lies behind the last expert's rows is given to it: defined values cost less than a look at the sizes, and
        nothing undefined can reach a gradient.
        """
        first_E = self.rows_per_expert_E[:-1]
        return torch.cat([first_E, (self.num_rows - first_E.sum()).unsqueeze(0)])


Experts = Callable[[Tensor, DispatchPlan], Tensor]  # tokens [T, D] as planned to uncombined outputs [T, K, D]


def row_multiple(x: Tensor) -> int:
    """Returns what to round each expert's rows up to."""
    return CPU_LOW_PRECISION_ROWS if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else 1


def count_slots(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Returns int64 how many slots each expert has, and last how many none has: [E + 1]."""
    bins_N = torch.where(expert_ids_TK >= 0, expert_ids_TK, num_experts).reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=bins_N.device)
    return counts.index_add_(0, bins_N, torch.ones_like(bins_N))


def plan_dispatch(
    expert_ids_TK: Tensor, num_experts: int, multiple: int = 1, counts: Tensor | None = None
) -> DispatchPlan:
    """Plans the sort by expert; among one expert's rows the order of tokens is kept.

    Args:
        expert_ids_TK: int64 ids in [0, num_experts), or negative for an empty slot.
        num_experts: E.
        multiple: Each expert's rows are rounded up to a multiple of this.
        counts: What `count_slots` returns, if it was called before.
    """
    ids_N = expert_ids_TK.reshape(-1)
    num_slots, device = ids_N.numel(), ids_N.device
    valid_N = ids_N >= 0
    bins_N = torch.where(valid_N, ids_N, num_experts)
    sorted_bins_N, slot_of_rank_N = torch.sort(bins_N, stable=True)
    if counts is None:
        counts = count_slots(expert_ids_TK, num_experts)
    rows = counts.clone()
    rows[:num_experts] = _round_up(counts[:num_experts], multiple)
    shift = _before(rows) - _before(counts)
    row_of_rank_N = torch.arange(num_slots, device=device) + shift[sorted_bins_N]
    row_of_slot_N = torch.empty_like(bins_N).scatter_(0, slot_of_rank_N, row_of_rank_N)
    num_rows = _rows_to_allocate(rows[:num_experts], num_slots, multiple)
    if device.type == "cpu":
        row_of_slot_N = row_of_slot_N.clamp(max=num_rows)
    return DispatchPlan(
        row_of_slot_TK=row_of_slot_N.view(expert_ids_TK.shape),
        valid_TK=valid_N.view(expert_ids_TK.shape),
        rows_per_expert_E=rows[:num_experts],
        num_rows=num_rows,
    )


def plan_blocks(counts_PE: Tensor, num_tokens: int, multiple: int = 1) -> DispatchPlan:
    """Plans the sort by expert of tokens that come in blocks, each of which is in that order already; one slot a token.

    The plan is that of `plan_dispatch`, without a sort.

    Args:
        counts_PE: int64 tokens of each expert in each of P blocks.
        num_tokens: T, their sum.
        multiple: Each expert's rows are rounded up to a multiple of this.
    """
    rows_E = _round_up(counts_PE.sum(0), multiple)
    first_token_PE = _before(counts_PE.flatten()).view(counts_PE.shape)
    shift_PE = _before(rows_E) + _before(counts_PE) - first_token_PE
    shift_T = shift_PE.flatten().repeat_interleave(counts_PE.flatten(), output_size=num_tokens)
    row_T = torch.arange(num_tokens, device=counts_PE.device) + shift_T
    return DispatchPlan(
        row_of_slot_TK=row_T.unsqueeze(1),
        valid_TK=torch.ones_like(row_T, dtype=torch.bool).unsqueeze(1),
        rows_per_expert_E=rows_E,
        num_rows=_rows_to_allocate(rows_E, num_tokens, multiple),
    )


def _round_up(counts: Tensor, multiple: int) -> Tensor:
    return (counts + multiple - 1) // multiple * multiple


def _before(counts: Tensor) -> Tensor:
    """Returns the sums of what comes before each entry in the first dimension."""
    return torch.cumsum(counts, 0) - counts


def _rows_to_allocate(rows_E: Tensor, num_slots: int, multiple: int) -> int:
    return int(rows_E.sum()) if rows_E.device.type == "cpu" else num_slots + rows_E.numel() * (multiple - 1)


def plan_everyone(num_tokens: int, num_experts: int, device: torch.device) -> DispatchPlan:
    """Plans that every expert runs once on every token: slot e of a token is expert e's."""
    row_TE = torch.arange(num_tokens * num_experts, device=device).view(num_experts, num_tokens).t()
    return DispatchPlan(
        row_of_slot_TK=row_TE.contiguous(),
        valid_TK=torch.ones_like(row_TE, dtype=torch.bool),
        rows_per_expert_E=torch.full((num_experts,), num_tokens, dtype=torch.int64, device=device),
        num_rows=num_tokens * num_experts,
    )


def _gather(rows: Tensor, index: Tensor, may_exceed: bool) -> Tensor:
    """Returns the rows of a 2-D tensor by index; the index behind the last row gives zeros.

    Args:
        rows: 2-D.
        index: int64.
        may_exceed: Whether that index can occur; the CPU looks for itself, elsewhere a look would synchronise.
    """
    if rows.device.type == "cpu":
        may_exceed = index.numel() > 0 and int(index.max()) >= rows.shape[0]
    if may_exceed:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, index)


def _slot_of_row(row_of_slot_TK: Tensor, num_rows: int) -> Tensor:
    """Returns the flat slot index of each row, N for rows that no slot owns."""
    num_slots = row_of_slot_TK.numel()
    slot_of_row = torch.full((num_rows + 1,), num_slots, dtype=torch.int64, device=row_of_slot_TK.device)
    slots = torch.arange(num_slots, device=row_of_slot_TK.device)
    return slot_of_row.scatter_(0, row_of_slot_TK.reshape(-1), slots)[:num_rows]


class _Permute(torch.autograd.Function):
    """x_TD -> sorted rows x_RD; rows that no slot owns are zero."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_slot_TK: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(row_of_slot_TK)
        slots = max(row_of_slot_TK.shape[1], 1)
        return _gather(x_TD, _slot_of_row(row_of_slot_TK, num_rows) // slots, num_rows != row_of_slot_TK.numel())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot_TK,) = ctx.saved_tensors
        grad_ND = _gather(grads[0], row_of_slot_TK.reshape(-1), may_exceed=False)
        return grad_ND.view(*row_of_slot_TK.shape, grads[0].shape[1]).sum(dim=1), None, None


class _Unpermute(torch.autograd.Function):
    """Sorted rows y_RD -> y_TKD in slot order."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        # As an attribute: a recomputation ends with the last tensor saved for it, and must not bring rows home again.
        ctx.row_of_slot_TK = row_of_slot_TK
        ctx.num_rows = y_RD.shape[0]
        y_ND = _gather(y_RD, row_of_slot_TK.reshape(-1), may_exceed=False)
        return y_ND.view(*row_of_slot_TK.shape, y_RD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        row_of_slot_TK = ctx.row_of_slot_TK
        grad_ND = grads[0].reshape(row_of_slot_TK.numel(), grads[0].shape[2])
        slot_of_row_R = _slot_of_row(row_of_slot_TK, ctx.num_rows)
        return _gather(grad_ND, slot_of_row_R, ctx.num_rows != grad_ND.shape[0]), None


def to_expert_order(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token into the rows of its experts: [R, D], zero in rows of padding."""
    result: Tensor = _Permute.apply(x_TD, plan.row_of_slot_TK, plan.num_rows)  # type: ignore[no-untyped-call]
    return result


def to_slot_order(y_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """Brings expert outputs back to their tokens: [T, K, D], zero in empty slots."""
    y_TKD: Tensor = _Unpermute.apply(y_RD, plan.row_of_slot_TK)  # type: ignore[no-untyped-call]
    if y_RD.device.type != "cpu":  # rows of empty slots hold something there; on the CPU they have none
        y_TKD = torch.where(plan.valid_TK.unsqueeze(-1), y_TKD, torch.zeros((), dtype=y_RD.dtype, device=y_RD.device))
    return y_TKD


def returned_to_slot_order(returned: Tensor, plan: DispatchPlan) -> Tensor:
    """Brings rows back to their tokens that other ranks computed: [T, K, D], zero in empty slots, which were not sent.

    Args:
        returned: The rows of the slots in use, in the plan's order.
        plan: The order in which they were sent.
    """
    if returned.shape[0] < plan.num_rows:
        missing = returned.new_zeros(plan.num_rows - returned.shape[0], returned.shape[1])
        returned = torch.cat([returned, missing])
    return to_slot_order(returned, plan)
