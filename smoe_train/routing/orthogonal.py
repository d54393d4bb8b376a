"""Orthogonal initial values."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(values: Tensor) -> Tensor:
    """Returns the orthonormal rows or columns, whichever are fewer, that QR makes of a matrix of normal values.

    The signs are those of the values, R having a positive diagonal, so that the result is a function of them alone.
    QR is done in fp64, so that no library's rounding shows in fp32. Source: Saxe et al. (arXiv 1312.6120).
    """
    is_tall = values.shape[0] >= values.shape[1]
    q, r = torch.linalg.qr(values.double() if is_tall else values.double().T)
    q = q * r.diagonal().sign()
    result: Tensor = q if is_tall else q.T
    return result.to(values.dtype)
