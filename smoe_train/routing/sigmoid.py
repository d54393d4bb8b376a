"""Sigmoid scores with a bias that balances the loads without a loss (arXiv 2408.15664, 2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smoe_train.routing.contract import Assignment, Context, Draw, RouterConfig, RouterPlan, RouterShape
from smoe_train.routing.losses import load_balance_loss
from smoe_train.routing.registry import register_router
from smoe_train.routing.router import Router
from smoe_train.routing.selection import combination_weights, router_dtype, select_top_k, without_padding


class SigmoidConfig(RouterConfig):
    """Options of the sigmoid router with a balancing bias."""

    when_loaded: ClassVar[Mapping[str, Any]] = {"bias_frozen_after_steps": None}

    type: Literal["sigmoid"] = "sigmoid"
    normalise: bool = True
    """Whether a token's weights are divided by their sum."""
    scaling_factor: float = Field(1.0, gt=0.0)
    """Factor on the weights (DeepSeek-V3: 2.5)."""
    bias_update_rate: float = Field(1e-3, ge=0.0)
    """How far an expert's selection bias moves in a step; at 0 it never does, and the router is a plain sigmoid one."""
    bias_update: Literal["sign", "proportional"] = "sign"
    """Moves by the sign of mean load - load, or by its size as a fraction of the mean load."""
    bias_frozen_after_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which the bias stays as it is; never if not given (DeepSeek-V3 stops 500 billion tokens
    before the end)."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights; the bias starts at 0."""

    def problems(self, plan: RouterPlan) -> list[str]:
        """A single normalised weight is constant; options of a bias that does not move, or never stops, do nothing."""
        found = []
        if self.normalise and 1 in plan.top_k_values:
            found.append(
                "normalise: true with k = 1 gives every token the same weight, so the router gets no gradient from "
                "the task; use normalise: false or k >= 2"
            )
        if self.bias_update_rate == 0.0 and self.bias_update != "sign":
            found.append("bias_update: has no effect with bias_update_rate: 0; leave it out")
        if self.bias_frozen_after_steps is not None:
            if self.bias_update_rate == 0.0:
                found.append("bias_frozen_after_steps: has no effect with bias_update_rate: 0; leave it out")
            elif self.bias_frozen_after_steps >= plan.max_steps:
                found.append(f"bias_frozen_after_steps: has no effect within training.max_steps {plan.max_steps}")
        return found


@register_router("sigmoid", SigmoidConfig)
class SigmoidRouter(Router):
    """Scores ``s = sigmoid(x W^T)``; the k highest of ``s + b`` are used, weighed by s alone.

    b balances the loads: after each optimizer step it rises for experts that had fewer slots than the mean over all
    ranks and micro-batches, and falls for those that had more. No gradient reaches it, and it enters no output.

    ``logits_TE`` is ``log s``, so that the softmax of it, which the statistics and the optional balance loss take, is
    the normalised score ``s_i / sum_j s_j``. The z-loss, which holds a softmax's free constant, has no meaning here.

    b is kept as the bits of fp32 numbers in an int32 buffer: whatever casts a model to bf16 (torch, DeepSpeed, a
    loader) leaves integers alone, and steps of 0.001 would be lost in bf16, which keeps 8 bits.

    Source: arXiv 2408.15664 (algorithm 1), arXiv 2412.19437 (eq. 13-16). Deviations: no shared experts and no limit
    on nodes; the optional balance loss is over the whole step (there over each sequence); ``proportional`` is relative
    to the mean load, so that it does not depend on the size of the batch; dropless.
    """

    loss_names: ClassVar[frozenset[str]] = frozenset({"load_balance_loss"})
    batch_losses: ClassVar[frozenset[str]] = frozenset({"load_balance_loss"})
    selects_by_logits: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2408.15664 (loss-free balancing); 2412.19437 (DeepSeek-V3)"
    summary: ClassVar[str] = "sigmoid scores; a bias in the selection balances the loads, without a loss"
    config: SigmoidConfig
    bias_bits_E: Tensor
    bias_updates: Tensor

    def __init__(self, config: SigmoidConfig, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))
        self.register_buffer("bias_bits_E", torch.zeros(shape.num_experts, dtype=torch.int32))
        self.register_buffer("bias_updates", torch.zeros((), dtype=torch.int64))

    @property
    def selection_bias(self) -> Tensor:
        """The bias, fp32 [E], sharing memory with the buffer."""
        return self.bias_bits_E.view(torch.float32)

    def initialise(self, draw: Draw) -> None:
        """Weights from N(0, init_std^2), bias 0."""
        with torch.no_grad():
            self.weight.copy_(draw.normal("weight", tuple(self.weight.shape), self.config.init_std))
            self.bias_bits_E.zero_()
            self.bias_updates.zero_()

    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Selects the ``context.top_k`` experts with the highest biased scores."""
        dtype = router_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.logsigmoid(F.linear(x_TD.to(dtype), self.weight.to(dtype)))
            scores_TE = logits_TE.exp()
            expert_ids_TK = select_top_k(scores_TE + self.selection_bias.to(dtype), context.top_k)
            if self.config.normalise:  # as a softmax of log s: also where every s of a token rounds to 0
                weights_TK = combination_weights(logits_TE, expert_ids_TK, "after_top_k")
            else:
                weights_TK = scores_TE.gather(1, expert_ids_TK)
            weights_TK = self.config.scaling_factor * weights_TK
        expert_ids_TK, weights_TK = without_padding(expert_ids_TK, weights_TK, context.token_mask_T)
        return Assignment(expert_ids_TK, weights_TK, logits_TE)

    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the load-balance loss of the normalised scores; switch it off to balance by the bias alone."""
        return {"load_balance_loss": load_balance_loss(assignment, context)}

    def begin_anew(self) -> None:
        """Keeps the bias, which may move again."""
        self.bias_updates.zero_()

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Moves the bias towards the experts that had too few slots in the step."""
        slots_E, config = stats["slots_E"], self.config
        mean = slots_E.mean()
        missing_E = mean - slots_E
        direction_E = torch.sign(missing_E) if config.bias_update == "sign" else missing_E / mean.clamp(min=1.0)
        step_E = config.bias_update_rate * direction_E
        if config.bias_frozen_after_steps is not None:
            step_E = torch.where(self.bias_updates < config.bias_frozen_after_steps, step_E, torch.zeros_like(step_E))
        self.selection_bias.add_(step_E)
        self.bias_updates.add_(1)
