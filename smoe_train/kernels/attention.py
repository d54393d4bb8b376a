"""Self-attention without a mask as one operator with a backward pass of its own.

Shape suffixes: B batch, H heads, S sequence, W head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smoe_train.kernels.experts import DTYPES


def attends(q_BHSW: Tensor, k_BHKW: Tensor, v_BHKW: Tensor, allowed: Tensor | None) -> bool:
    """Returns whether the operator computes this: self-attention on the CPU, in fp32 or bf16, without a mask."""
    alike = q_BHSW.shape == k_BHKW.shape == v_BHKW.shape and q_BHSW.dtype == k_BHKW.dtype == v_BHKW.dtype
    return allowed is None and alike and q_BHSW.device.type == "cpu" and q_BHSW.dtype in DTYPES


def attend(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSW: Tensor, causal: bool) -> Tensor:
    """Returns the attended values [B, H, S, W], which lie in memory as [B, S, H, W].

    Scores, softmax and sums are in fp32; in bf16, probabilities are rounded before they are multiplied by the values,
    as in torch's own kernels.

    Args:
        q_BHSW: Queries, fp32 or bf16 on the CPU, with any strides.
        k_BHSW: Keys.
        v_BHSW: Values.
        causal: Whether a token sees only itself and those before it.
    """
    y_BHSW: Tensor = torch.ops.smoe_train.attention(q_BHSW, k_BHSW, v_BHSW, causal)[0]
    return y_BHSW


def register() -> None:
    """Tells torch the operator's derivative, and what its results look like to the compiler. Once a process."""
    name = "smoe_train::attention"
    torch.library.register_fake(name)(_results)
    torch.library.register_fake(f"{name}_backward")(_gradients)
    torch.library.register_autograd(name, _backward, setup_context=_save)


def _results(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_heads(q), _like_heads(q), _like_heads(q)


def _like_heads(q_BHSW: Tensor) -> Tensor:
    batch, heads, length, width = q_BHSW.shape
    return q_BHSW.new_empty(batch, length, heads, width).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, dy: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.smoe_train.attention_backward(dy, *ctx.saved_tensors, ctx.causal), None
