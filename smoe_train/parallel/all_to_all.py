"""Uneven all-to-all of token rows, differentiable: the backward pass sends gradients the way the rows came."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoe_train.parallel.traffic import count_rows


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any, kind: str) -> Tensor:
        ctx.arguments = (send_rows, receive_rows, group, kind)
        return exchange(rows, send_rows, receive_rows, group, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        send_rows, receive_rows, group, kind = ctx.arguments
        return exchange(grads[0], receive_rows, send_rows, group, f"{kind}_gradients"), None, None, None, None


def start_exchange(
    rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any, kind: str
) -> tuple[Tensor, Any]:
    """Starts an `exchange`; returns what will hold the rows, and the work to wait for before it is read."""
    received = rows.new_empty((sum(receive_rows), *rows.shape[1:]))
    count_rows(kind, rows, sum(send_rows) - send_rows[dist.get_rank(group)])
    work = dist.all_to_all_single(received, rows.contiguous(), receive_rows, send_rows, group=group, async_op=True)
    return received, work


def exchange(rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any, kind: str) -> Tensor:
    """Sends consecutive blocks of rows to the ranks of a group and returns what they sent, in rank order.

    Args:
        rows: [sum(send_rows), ...]; they travel in their dtype.
        send_rows: Rows for each rank of the group.
        receive_rows: Rows from each rank of the group.
        group: Process group.
        kind: What they are, see `smoe_train.parallel.traffic`.
    """
    received, work = start_exchange(rows, send_rows, receive_rows, group, kind)
    work.wait()
    return received


def all_to_all(rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any, kind: str) -> Tensor:
    """Like `exchange`, with gradients."""
    received: Tensor = _AllToAll.apply(rows, send_rows, receive_rows, group, kind)  # type: ignore[no-untyped-call]
    return received
