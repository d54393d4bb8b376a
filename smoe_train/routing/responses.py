"""How strongly an expert responds to a token: functions of its output, by name; a decorated function is a new one.

Source: arXiv 2505.13380 (``softplus_mean``; the others are among the variants in the released code) and 2402.02526
(``l2norm``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_train.registry import Registry

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Response:
    """A response function.

    Attributes:
        of: Outputs [R, D], fp32 or wider, to responses [R].
        signed: Whether a response can be negative; it then cannot be divided by a sum of responses.
    """

    of: Function
    signed: bool = False


RESPONSES: Registry[Response] = Registry("response")


def register_response(name: str, signed: bool = False) -> Callable[[Function], Function]:
    """Returns a decorator that adds a function of outputs [R, D] under a name; see `Response`."""

    def add(of: Function) -> Function:
        RESPONSES.register(name)(Response(of, signed))
        return of

    return add


@register_response("softplus_mean")
def softplus_mean(y_RD: Tensor) -> Tensor:
    """``mean_d softplus(y_d)``: above 0, and blind to how negative an output is."""
    return F.softplus(y_RD).mean(dim=-1)


@register_response("l2norm")
def l2norm(y_RD: Tensor) -> Tensor:
    """``||y||``."""
    norm_R: Tensor = torch.linalg.vector_norm(y_RD, dim=-1)
    return norm_R


@register_response("relu_mean")
def relu_mean(y_RD: Tensor) -> Tensor:
    """``mean_d max(y_d, 0)``."""
    return F.relu(y_RD).mean(dim=-1)


@register_response("silu_mean", signed=True)
def silu_mean(y_RD: Tensor) -> Tensor:
    """``mean_d y_d sigmoid(y_d)``, which can be negative."""
    return F.silu(y_RD).mean(dim=-1)


@register_response("sigmoid_mean")
def sigmoid_mean(y_RD: Tensor) -> Tensor:
    """``mean_d sigmoid(y_d)``."""
    return torch.sigmoid(y_RD).mean(dim=-1)
