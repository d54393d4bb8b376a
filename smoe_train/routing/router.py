"""The router contract: which experts a token visits (assign), and what becomes of their outputs (merge).

A router is arithmetic only. It holds no process group, draws no random numbers inside ``forward`` and never infers
training from ``requires_grad``: everything that varies comes in the `Context`, which is the same on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from smoe_train import kernels
from smoe_train.routing.contract import (
    EMPTY_SLOT,
    Assignment,
    Contest,
    Context,
    Draw,
    Merged,
    Outcome,
    RouterConfig,
    RouterShape,
)
from smoe_train.routing.losses import routing_stats


class Router(nn.Module, ABC):
    """Base of all routing policies: one file and one recipe each; the conformance suite runs over all of them.

    Attributes:
        loss_names: Auxiliary losses that the policy can return; a coefficient for any other is a mistake.
        batch_losses: Those of them that are not means over tokens, but functions of sums over the whole batch.
        causal: Whether a token's routing depends on no later token; False makes a policy useless for generation.
        selects_by_logits: Whether a token's k experts are those with its k highest logits.
        looks_back_tokens: Earlier tokens of a sequence that decide about one; generation then runs without a cache.
        fused: Whether outputs are combined by the operator of `smoe_train.kernels`, which must be loaded.
        paper: Where the policy comes from, with its arXiv id.
        summary: The idea in one line.
    """

    loss_names: ClassVar[frozenset[str]]
    batch_losses: ClassVar[frozenset[str]] = frozenset()
    causal: ClassVar[bool] = True
    selects_by_logits: ClassVar[bool] = True
    looks_back_tokens: int = 0
    paper: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, config: RouterConfig, shape: RouterShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.fused = False

    @classmethod
    def build(cls, config: RouterConfig, shape: RouterShape, num_layers: int) -> list[Router]:
        """Returns one router for each of ``num_layers`` MoE layers; a policy that shares parts overrides this."""
        return [cls(config, shape) for _ in range(num_layers)]

    @classmethod
    def losses_of(cls, config: RouterConfig) -> frozenset[str]:
        """Returns the auxiliary losses of a policy with these options: a policy over a base has the base's too."""
        return cls.loss_names

    @classmethod
    def batch_losses_of(cls, config: RouterConfig) -> frozenset[str]:
        """Returns those of `losses_of` that are functions of sums over the whole batch."""
        return cls.batch_losses

    @abstractmethod
    def initialise(self, draw: Draw) -> None:
        """Sets every parameter and buffer to its initial value."""

    @abstractmethod
    def assign(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Assignment:
        """Chooses experts and weights for each token.

        Args:
            x_TD: Input of the MoE layer, any floating dtype; the arithmetic is fp32 (fp64 for fp64 input).
            token_ids_T: int64 vocabulary ids of the same tokens.
            context: The decisions for this pass.
        """

    @abstractmethod
    def losses(self, assignment: Assignment, context: Context) -> dict[str, Tensor]:
        """Returns the auxiliary losses that the assignment alone determines."""

    def contest(self, context: Context) -> Contest | None:
        """Returns how the experts compete in this pass, or None where the assignment decides."""
        return None

    def settle(self, assignment: Assignment, outcome: Outcome, context: Context) -> Assignment:
        """Returns the assignment that a contest led to.

        Args:
            assignment: What `assign` would have done.
            outcome: Responses and winners.
            context: The decisions for this pass.
        """
        raise NotImplementedError(f"{type(self).__name__} announces a contest but does not settle it")

    def merge(self, assignment: Assignment, y_TKD: Tensor, context: Context) -> Merged:
        """Combines the experts' outputs: by default the weighted sum over the slots.

        Args:
            assignment: What `assign` returned.
            y_TKD: Uncombined expert outputs in slot order, zero in empty slots.
            context: The decisions for this pass.
        """
        out_TD = self.combine(y_TKD, assignment.weights_TK)
        experts_of_token_T = (assignment.expert_ids_TK != EMPTY_SLOT).sum(dim=1)
        return Merged(out_TD, experts_of_token_T, self.losses(assignment, context), routing_stats(assignment, context))

    def combine(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns the weighted sum [T, D] of each token's slots, in the dtype of the outputs."""
        if self.fused and kernels.supports(y_TKD, y_TKD) and weights_TK.dtype == torch.float32:
            return kernels.combine(y_TKD, weights_TK)
        return torch.bmm(weights_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    def trained_by(self, context: Context) -> dict[str, frozenset[str]]:
        """Returns, for the task (``task``) and each auxiliary loss, the own parameters that get gradient from it.

        ``context`` says what kind of pass it is: competing or not, early or late. By default every trainable parameter
        gets gradient from everything. The experts of the same layer get gradient
        from the task and from what `losses_reaching_experts` names. The self-test holds a run to this.
        """
        trainable = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        return dict.fromkeys(["task", *self.losses_of(self.config)], trainable)

    def losses_reaching_experts(self, context: Context) -> frozenset[str]:
        """Returns the auxiliary losses whose gradient reaches the experts of the same layer."""
        return frozenset()

    def rehearsal(self, stats: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Returns a state for the self-test in which every loss is at work, left again without a trace.

        For policies one of whose losses is 0 at first, whatever it should train.

        Args:
            stats: Of a pass over the tokens that the self-test uses.
        """
        return nullcontext()

    def late_frozen(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained at first and frozen later, see `frozen`."""
        return []

    def frozen(self, step: int) -> bool:
        """Returns whether `late_frozen` is frozen in an optimizer step: not a bit of it changes then."""
        return False

    def begin_anew(self) -> None:
        """Called once the weights of another training are loaded: what counts steps of a training begins at 0."""

    def adapts(self) -> bool:
        """Returns whether `after_step` does anything; the sums over ranks that it is given cost a reduction a step."""
        return type(self).after_step is not Router.after_step

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        """Called once after each optimizer step with the step's summed stats; the only place to change a buffer."""
