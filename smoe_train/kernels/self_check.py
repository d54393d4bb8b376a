"""A look at the compiled operators where they are first loaded: on a kind of CPU that nobody has tried them on, too.

The products are oneDNN's, which computes them differently on different CPUs (with AMX in tiles, for one).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_train.kernels.attention import attend
from smoe_train.kernels.experts import run_experts

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the norm; a wrong layout is off by about 1


@torch.enable_grad()
def disagreement() -> str | None:
    """Returns where the operators compute something else than PyTorch does in fp64, or None; in some milliseconds."""
    for dtype, tolerance in TOLERANCE.items():
        for name, (found, expected) in {"experts": _experts(dtype), "attention": _attention(dtype)}.items():
            for one, other in zip(found, expected, strict=True):
                error = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
                if not error <= tolerance:
                    return f"{name} in {str(dtype).removeprefix('torch.')} are off by {error:.1e} of their norm"
    return None


Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


def _experts(dtype: torch.dtype) -> Pair:
    """Outputs and gradients of two SwiGLU experts, of 70 and 20 tokens: a full block and parts of one."""
    generator = torch.Generator().manual_seed(0)
    x_TD, dy_TKD = _randoms(dtype, generator, (90, 64), (90, 1, 64))
    weights = _randoms(dtype, generator, (2, 64, 96), (2, 64, 96), (2, 96, 64))
    row_TK = torch.randperm(90, generator=generator).unsqueeze(1)
    found = run_experts(x_TD, row_TK, torch.tensor([70, 20]), "swiglu", *weights)
    gradients = torch.autograd.grad(found, [x_TD, *weights], dy_TKD)
    x, (gate, w_in, w_out) = _doubles([x_TD])[0], _doubles(weights)
    both = [(F.silu(x @ gate[e]) * (x @ w_in[e])) @ w_out[e] for e in range(2)]
    expected = torch.where(row_TK < 70, both[0], both[1]).unsqueeze(1)
    return [found, *gradients], [expected, *torch.autograd.grad(expected, [x, gate, w_in, w_out], dy_TKD.double())]


def _attention(dtype: torch.dtype) -> Pair:
    """Outputs and gradients of causal attention over a full block of 64 tokens and a part of one."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 90, 32)
    q, k, v, dy = _randoms(dtype, generator, shape, shape, shape, shape)
    inputs = [q, k, v]
    found = attend(q, k, v, causal=True)
    copies = _doubles(inputs)
    expected = F.scaled_dot_product_attention(copies[0], copies[1], copies[2], is_causal=True)
    return (
        [found, *torch.autograd.grad(found, inputs, dy)],
        [expected, *torch.autograd.grad(expected, copies, dy.double())],
    )


def _randoms(dtype: torch.dtype, generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [(torch.randn(shape, generator=generator) * 0.5).to(dtype).requires_grad_() for shape in shapes]


def _doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]
