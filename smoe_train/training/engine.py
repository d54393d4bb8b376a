"""What training needs of an engine, and the engine of one process: plain PyTorch, the reference for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smoe_train.checkpoint import StateAccess

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(StateAccess, Protocol):
    """Runs a model, accumulates gradients and takes optimizer steps; `DeepSpeedEngine` is the one for many ranks."""

    gradient_norm: Tensor | float

    def forward(self, **inputs: Any) -> Any:
        """Runs the model."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's share of the step's gradients."""
        ...

    def step(self, learning_rate: float, frozen: bool = False, refuse: bool = False) -> bool:
        """Clips, updates the parameters and clears the gradients.

        Nothing is updated if a gradient is not finite on any rank: weights and moments stay what they are, to the bit.

        Args:
            learning_rate: Of this step.
            frozen: Whether the groups marked ``late_frozen`` stay what they are, to the bit.
            refuse: Whether to clear the gradients only; the same on every rank.

        Returns:
            Whether the parameters were updated, the same on every rank.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


class LocalEngine:
    """One process in fp32, without DeepSpeed.

    Args:
        model: The model, with its experts in this process.
        parameter_groups: Optimizer groups.
        make_optimizer: Builds the optimizer from groups.
        accumulation_steps: Micro-batches an optimizer step.
        clip_norm: Largest global gradient norm, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter_groups: Sequence[dict[str, Any]],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        accumulation_steps: int,
        clip_norm: float | None,
    ) -> None:
        self._model = model
        self._optimizer = make_optimizer(list(parameter_groups))
        self._accumulation_steps = accumulation_steps
        self._clip_norm = clip_norm if clip_norm is not None else float("inf")
        self.gradient_norm: Tensor | float = float("nan")

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._model

    def forward(self, **inputs: Any) -> Any:
        """Runs the model."""
        return self._model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's share of the step's gradients."""
        (loss / self._accumulation_steps).backward()

    def step(self, learning_rate: float, frozen: bool = False, refuse: bool = False) -> bool:
        """Clips, updates the parameters and clears the gradients, unless they are not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0 if frozen and group.get("late_frozen") else learning_rate
        self.gradient_norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        updated = not refuse and bool(self.gradient_norm.isfinite())
        if updated:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return updated

    def read_state(self, parameter: nn.Parameter, copy: bool = True) -> dict[str, Tensor]:
        """Returns a parameter's weight and, once there are some, its moments; copies, or what the next step changes."""
        moments = self._optimizer.state.get(parameter, {})
        state = {"weight": parameter, **{key: value for key, value in moments.items() if key != "step"}}
        return {key: value.detach().clone() if copy else value.detach() for key, value in state.items()}

    def optimizer_steps(self) -> int:
        """Returns how many steps the optimizer has taken."""
        return next((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), 0)

    def start_loading(self, optimizer_steps: int) -> None:
        """Creates optimizer state for `write_state` to fill."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(optimizer_steps), dtype=torch.float32, device=parameter.device),
                    **{key: torch.zeros_like(parameter) for key in MOMENTS},
                }

    def write_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Puts a parameter's weight and moments back."""
        with torch.no_grad():
            parameter.copy_(state["weight"])
        for key, value in state.items():
            if key != "weight":
                self._optimizer.state[parameter][key] = value.to(parameter.device).clone()

    def close(self) -> None:
        """Has nothing to free."""
