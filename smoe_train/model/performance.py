"""The recipe's performance section: in which form a step is computed. The forms differ in rounding only.

A resumed run is equal to an uninterrupted one to the bit if both have the same forms, and a note says which they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from smoe_train.config import StrictModel

if TYPE_CHECKING:
    from torch import nn

ExpertsForm = Literal["torch", "cpp", "auto"]


class PerformanceConfig(StrictModel):
    """Forms of the parts of a step."""

    experts: ExpertsForm = "torch"
    """The experts on a CPU. ``torch``: PyTorch's operations. ``cpp``: an operator that is compiled at the first use on
    a machine (about 10 s; needs a C++ compiler), for fp32 and bf16; accelerators keep to PyTorch's grouped product.
    ``auto``: ``cpp`` where it can be compiled, and a note where not."""


def apply_performance(model: nn.Module, config: PerformanceConfig, device_type: str) -> list[str]:
    """Switches a model to the configured forms; returns what there is to say of them.

    Args:
        model: As built.
        config: The recipe's section.
        device_type: Where the model is trained.

    Raises:
        LaunchError: A form was asked for that cannot be had on this machine.
    """
    return _fuse_experts(model, config.experts, device_type)


def _fuse_experts(model: nn.Module, form: ExpertsForm, device_type: str) -> list[str]:
    from smoe_train.kernels.build import load_experts_kernel, why_not
    from smoe_train.model.feed_forward import StackedExperts

    stacks = [module for module in model.modules() if isinstance(module, StackedExperts)]
    if form == "torch" or device_type != "cpu" or not stacks:
        return []
    if form == "auto" and (missing := why_not()) is not None:
        return [f"experts: PyTorch's operations, as {missing}"]
    load_experts_kernel()
    for stack in stacks:
        stack.fused = True
    return ["experts: the compiled operator"]
