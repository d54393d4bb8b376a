"""The experts of a layer as one operator with a backward pass of its own.

Shape suffixes: T tokens, K slots a token, R rows sorted by expert, D d_model, F d_ff, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)


def supports(x_TD: Tensor, weight: Tensor) -> bool:
    """Returns whether the operator computes this: on the CPU, in fp32 or bf16, in one dtype."""
    return x_TD.device.type == "cpu" and x_TD.dtype in DTYPES and weight.dtype == x_TD.dtype


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_slot_TK: Tensor, rows_E: Tensor, kind: str, *weights: Tensor) -> Tensor:
        x_TD, row_of_slot_TK = x_TD.contiguous(), row_of_slot_TK.contiguous()
        weights = tuple(weight.contiguous() for weight in weights)
        y_TKD, gate_RF, hidden_RF = torch.ops.smoe_train.experts_forward(
            x_TD, row_of_slot_TK, rows_E, kind, *_by_name(kind, weights)
        )
        ctx.kind = kind
        ctx.save_for_backward(x_TD, row_of_slot_TK, rows_E, gate_RF, hidden_RF, *weights)
        result: Tensor = y_TKD
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, row_of_slot_TK, rows_E, gate_RF, hidden_RF, *weights = ctx.saved_tensors
        need_weights = any(ctx.needs_input_grad[4:])
        dx_TD, d_gate, d_in, db_in, d_out, db_out = torch.ops.smoe_train.experts_backward(
            grads[0].contiguous(),
            x_TD,
            row_of_slot_TK,
            rows_E,
            gate_RF,
            hidden_RF,
            ctx.kind,
            *_by_name(ctx.kind, weights),
            need_weights,
        )
        of_weights = (d_gate, d_in, d_out) if ctx.kind == "swiglu" else (d_in, db_in, d_out, db_out)
        return dx_TD, None, None, None, *(of_weights if need_weights else (None,) * len(weights))


def _by_name(kind: str, weights: Any) -> tuple[Tensor | None, ...]:
    """Returns w_gate, w_in, b_in, w_out, b_out."""
    if kind == "swiglu":
        gate, w_in, w_out = weights
        return gate, w_in, None, w_out, None
    w_in, b_in, w_out, b_out = weights
    return None, w_in, b_in, w_out, b_out


def run_experts(x_TD: Tensor, row_of_slot_TK: Tensor, rows_per_expert_E: Tensor, kind: str, *weights: Tensor) -> Tensor:
    """Runs each slot's expert on the slot's token; returns the uncombined outputs [T, K, D], zero in empty slots.

    Activations are computed in fp32 and rounded once, also in bf16, where PyTorch's operations round in between.

    Args:
        x_TD: fp32 or bf16 on the CPU.
        row_of_slot_TK: int64 row of each slot among the rows sorted by expert; of an empty slot the number of rows.
        rows_per_expert_E: int64; rows that no slot owns are padding.
        kind: ``relu``, ``gelu`` or ``swiglu``.
        weights: ``swiglu``: w_gate [E, D, F], w_in [E, D, F], w_out [E, F, D]; otherwise w_in, b_in [E, F], w_out,
            b_out [E, D]. Of the dtype of ``x_TD``.
    """
    y_TKD: Tensor = _Experts.apply(x_TD, row_of_slot_TK, rows_per_expert_E, kind, *weights)  # type: ignore[no-untyped-call]
    return y_TKD


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        y_TKD, weights_TK = y_TKD.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(y_TKD, weights_TK)
        out_TD: Tensor = torch.ops.smoe_train.combine(y_TKD, weights_TK)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dy_TKD, dweights_TK = torch.ops.smoe_train.combine_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return dy_TKD, dweights_TK


def combine(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Returns the weighted sum [T, D] of each token's slots, added up in fp32 and rounded once.

    Args:
        y_TKD: fp32 or bf16 on the CPU.
        weights_TK: fp32.
    """
    out_TD: Tensor = _Combine.apply(y_TKD, weights_TK)  # type: ignore[no-untyped-call]
    return out_TD
