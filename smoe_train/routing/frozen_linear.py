"""A linear router whose random weights stay what they are: what `smoe_dropout` and `random` share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoe_train.routing.contract import Draw, RouterPlan, RouterShape
from smoe_train.routing.softmax_top_k import SoftmaxTopKConfig, SoftmaxTopKRouter


class FrozenLinearConfig(SoftmaxTopKConfig):
    """Options of both."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """A frozen router has no gradient to lose at k = 1."""
        return []


class FrozenLinearRouter(SoftmaxTopKRouter):
    """Scores ``x W^T (+ b)`` with frozen random W and b.

    They are parameters with ``requires_grad=False``, so that checkpoints and data-parallel engines carry them, and
    enter the product detached, so that nothing trains them even if a caller makes all parameters trainable. Gradients,
    of the task and of any router loss with a coefficient, pass through the scores into the tokens alone: such a loss
    moves the layers below until their tokens spread over a router that does not move.

    Args:
        config: Options.
        shape: The model around the router.
        weight_std: Standard deviation of the weights.
        bias_std: Standard deviation of the bias; 0 for none, which is what a frozen bias that starts at 0 is.
    """

    def __init__(
        self, config: FrozenLinearConfig, shape: RouterShape, weight_std: float, bias_std: float = 0.0
    ) -> None:
        super().__init__(config, shape)
        self._weight_std, self._bias_std = weight_std, bias_std
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape.num_experts), requires_grad=False) if bias_std else None

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, weight_std^2), bias from N(0, bias_std^2)."""
        with torch.no_grad():
            self.weight.copy_(draw.normal("weight", tuple(self.weight.shape), self._weight_std))
            if self.bias is not None:
                self.bias.copy_(draw.normal("bias", tuple(self.bias.shape), self._bias_std))

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Returns the frozen weight [E, D] and bias [E], detached."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()
