"""Uneven all-to-all of token rows, differentiable: the backward pass sends gradients the way the rows came."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any) -> Tensor:
        ctx.splits = (send_rows, receive_rows, group)
        return exchange(rows, send_rows, receive_rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send_rows, receive_rows, group = ctx.splits
        return exchange(grads[0], receive_rows, send_rows, group), None, None, None


def exchange(rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any) -> Tensor:
    """Sends consecutive blocks of rows to the ranks of a group and returns what they sent, in rank order.

    Args:
        rows: [sum(send_rows), ...].
        send_rows: Rows for each rank of the group.
        receive_rows: Rows from each rank of the group.
        group: Process group.
    """
    received = rows.new_empty((sum(receive_rows), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive_rows, send_rows, group=group)
    return received


def all_to_all(rows: Tensor, send_rows: list[int], receive_rows: list[int], group: Any) -> Tensor:
    """Like `exchange`, with gradients."""
    received: Tensor = _AllToAll.apply(rows, send_rows, receive_rows, group)  # type: ignore[no-untyped-call]
    return received
