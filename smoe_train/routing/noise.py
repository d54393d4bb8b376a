"""Noise as a pure function of (seed, step, layer, token): the same at any topology and in any recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(value: int) -> int:
    """Reinterprets an unsigned 64-bit constant as the signed integer that torch's int64 holds."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on wrapping int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def uniform_noise(seed: int, step: int, layer: int, token_index_T: Tensor, width: int) -> Tensor:
    """Returns fp32 uniform values in [0, 1) of shape [T, width], on the device of ``token_index_T``.

    Args:
        seed: Run seed.
        step: Optimizer step.
        layer: Layer index.
        token_index_T: int64 index of each token within the global batch.
        width: Values a token.
    """
    golden = 0x9E3779B97F4A7C15
    key = _signed(seed * golden + step * 0xD1B54A32D192ED03 + layer * 0x8CB92BA72F3D8DD7)
    rows_T1 = _mix(token_index_T.unsqueeze(1) + key)
    columns_W = torch.arange(1, width + 1, device=token_index_T.device) * _signed(golden)
    return ((_mix(rows_T1 + columns_W) >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)
