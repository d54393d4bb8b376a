"""The trained linear top-k router, the baseline of every paper (Shazeer et al. 1701.06538; GShard; Switch)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.contract import Draw, RouterShape
from smoe_train.routing.registry import register_router
from smoe_train.routing.softmax_top_k import SoftmaxTopKConfig, SoftmaxTopKRouter


class TopKConfig(SoftmaxTopKConfig):
    """Options of the trained linear top-k router."""

    type: Literal["top_k"] = "top_k"
    bias: bool = False
    """Whether scores have a trained bias (FastMoE's naive gate has one; Switch, Mixtral and DeepSpeed have none)."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights; the bias starts at 0."""


@register_router("top_k", TopKConfig)
class TopKRouter(SoftmaxTopKRouter):
    """Trained linear router: scores ``x W^T (+ b)``, the k best experts, softmax weights.

    Source: arXiv 1701.06538 without its noise; GShard (2006.16668) and Switch (2101.03961) for the balance loss.
    Deviations: dropless; ``softmax: after_top_k`` by default (Mixtral's rule, equal to renormalised probabilities).
    """

    paper: ClassVar[str] = "arXiv 1701.06538; 2006.16668 (GShard); 2101.03961 (Switch)"
    summary: ClassVar[str] = "a trained linear layer scores the experts; the k best are used"
    config: TopKConfig

    def __init__(self, config: TopKConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))
        self.bias = nn.Parameter(torch.empty(shape.num_experts)) if config.bias else None

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, init_std^2), bias 0."""
        with torch.no_grad():
            self.weight.copy_(draw.normal("weight", tuple(self.weight.shape), self.config.init_std))
            if self.bias is not None:
                self.bias.zero_()

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Returns the trained weight and bias."""
        return self.weight, self.bias
