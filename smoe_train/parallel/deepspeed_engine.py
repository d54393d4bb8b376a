"""DeepSpeed's engine behind the few calls that training makes, and access to the optimizer state by parameter.

DeepSpeed owns ZeRO, gradient reduction and precision. Gradient clipping under ZeRO 0 is done here, because DeepSpeed
averages the ranks' norms there instead of adding up the experts' (measured; ZeRO 1 and 2 are exact).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from smoe_train.parallel.footprint import LARGEST_BUCKET, LARGEST_EXPERT_GROUP
from smoe_train.parallel.process import Process
from smoe_train.parallel.topology import ParallelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")

# DeepSpeed 0.19 calls it; torch 2.13 has given it another name.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


class DeepSpeedEngine:
    """Trains a model that holds `DeepSpeedExpertBank` layers.

    Args:
        model: The model, initialised alike on every rank.
        parameter_groups: Optimizer groups with ``params`` and a ``name`` each.
        make_optimizer: Builds the torch optimizer from groups.
        config: The recipe's parallel section.
        process: This process.
        micro_batch_size: Sequences a rank and micro-batch.
        accumulation_steps: Micro-batches an optimizer step.
        clip_norm: Largest global gradient norm, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter_groups: Sequence[dict[str, Any]],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        config: ParallelConfig,
        process: Process,
        micro_batch_size: int,
        accumulation_steps: int,
        clip_norm: float | None,
    ) -> None:
        self._process = process
        self._linked = False
        self._stage = config.zero_stage
        self._clip_here = clip_norm if config.zero_stage == 0 else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bucket = min(LARGEST_BUCKET, trained + trained % 2)  # ZeRO insists on an even number of elements
        split = split_params_into_different_moe_groups_for_optimizer(
            [dict(group) for group in parameter_groups], max_group_size=LARGEST_EXPERT_GROUP
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer([group for group in split if group["params"]]),
            config={
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": accumulation_steps,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                },
                "bf16": {"enabled": config.precision == "bf16"},
                "gradient_clipping": 0.0 if self._clip_here or clip_norm is None else clip_norm,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
                "timers": {"throughput": {"enabled": False}},  # it synchronises the device at every micro-batch
            },
            dist_init_required=False,
        )
        self.gradient_norm: Tensor | float = float("nan")
        self._refused = False
        self._watch_updates()

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, **inputs: Any) -> Any:
        """Runs the model."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradients; at the last of a step they are reduced over the ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, learning_rate: float, frozen: bool = False, refuse: bool = False) -> bool:
        """Clips, updates the parameters and clears the gradients; see `smoe_train.training.engine.Engine`."""
        for group in self._optimizer.param_groups:
            # Adam moves nothing at a rate of 0, whatever its moments and weight decay are.
            group["lr"] = 0.0 if frozen and group.get("late_frozen") else learning_rate
        if self._stage == 0:
            norm = self._clip()
            self._refused = refuse or not bool(norm.isfinite())
            self._engine.step()
            return not self._refused
        self._refused = refuse
        self._engine.step()
        updated = bool(self._engine.was_step_applied())
        if updated and not self._linked:
            self._link_optimizer_states()
        self.gradient_norm = self._engine.get_global_grad_norm()
        return updated

    def _watch_updates(self) -> None:
        """Lets the optimizer pass over a step without an update: DeepSpeed does so for low precisions only."""
        optimizer = self._optimizer
        if self._stage == 0:
            update = optimizer.step
            optimizer.step = lambda *arguments, **options: None if self._refused else update(*arguments, **options)
        else:
            found = optimizer.has_overflow
            optimizer.has_overflow = lambda partition_gradients=True: self._refused or found(partition_gradients)
            # Without it ZeRO looks at norms alone in fp32, and means of them over ranks hide one that is not finite.
            optimizer.check_grad_overflow = True

    def _clip(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        shared, experts = (
            nn.utils.get_total_norm([p.grad for p in parameters if is_moe_param(p) == of_experts])  # type: ignore[misc]
            for of_experts in (False, True)
        )
        squared = experts.square()
        names = {p.group_name for p in parameters if is_moe_param(p)}  # type: ignore[attr-defined]
        for name in names:
            dist.all_reduce(squared, group=groups._get_expert_parallel_group(name))
        norm = (shared.square() + squared).sqrt()
        if self._clip_here is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_here, norm)
        self.gradient_norm = norm
        return norm

    def read_state(self, parameter: nn.Parameter, copy: bool = True) -> dict[str, Tensor]:
        """Returns a parameter's master weights and moments in fp32; a collective under ZeRO.

        Keys: ``weight``, and ``exp_avg``, ``exp_avg_sq`` once the optimizer has stepped. Parameters that are not
        trained have their weight only. Experts' values are those of this rank's experts. Without ``copy`` they are,
        where nothing has to be gathered, what the next step changes.
        """
        if not parameter.requires_grad:
            return {"weight": parameter.detach().to(torch.float32, copy=copy)}
        if self._stage == 0:
            moments = self._optimizer.state.get(parameter, {})
            held = {"weight": parameter, **{key: moments[key] for key in MOMENTS if key in moments}}
            return {key: value.detach().to(torch.float32, copy=copy) for key, value in held.items()}
        state = {"weight": safe_get_full_fp32_param(parameter)}
        if self.optimizer_steps():
            state |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return state

    def optimizer_steps(self) -> int:
        """Returns how many steps the optimizer has taken, the exponent of Adam's bias correction."""
        for state in self._torch_optimizer().state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def start_loading(self, optimizer_steps: int) -> None:
        """Creates optimizer state for `write_state` to fill, as if the optimizer had taken that many steps."""
        optimizer = self._torch_optimizer()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # torch keeps the step on the parameter's device for a fused optimizer, on the host otherwise.
                device = parameter.device if group.get("fused") else torch.device("cpu")
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(optimizer_steps), dtype=torch.float32, device=device),
                    **{key: torch.zeros_like(parameter) for key in MOMENTS},
                }
        if self._stage > 0:
            self._link_optimizer_states()

    def write_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Puts back what `read_state` returned; moments only after `start_loading`."""
        weight = state["weight"].to(parameter.device)
        with torch.no_grad():
            parameter.copy_(weight)
        if not parameter.requires_grad:
            return
        moments = {key: state[key].to(parameter.device) for key in MOMENTS if key in state}
        if self._stage == 0:
            for key, value in moments.items():
                self._optimizer.state[parameter][key].copy_(value)
            return
        safe_set_full_fp32_param(parameter, weight)
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        """Frees what DeepSpeed holds."""
        self._engine.destroy()

    def _link_optimizer_states(self) -> None:
        """Lets parameters find their moments: DeepSpeed does so after its first group's step, too early for others."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        return optimizer
