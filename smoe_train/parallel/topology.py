"""Which rank holds which expert, and which sizes are possible; pure arithmetic, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from smoe_train.config import StrictModel
from smoe_train.errors import TopologyError


class ParallelConfig(StrictModel):
    """How a run is spread over processes."""

    engine: Literal["deepspeed", "local"] = "deepspeed"
    """``deepspeed``: ZeRO, expert parallelism, bf16. ``local``: plain PyTorch in one process and fp32, a reference."""
    expert_parallel_size: int = Field(1, ge=1)
    """Ranks that share one set of experts; the others hold copies (expert data parallelism)."""
    zero_stage: int = Field(1, ge=0, le=3)
    """ZeRO stage 0, 1 (optimizer states partitioned) or 2 (gradients too). Stage 3 is refused: see the message."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of weights and activations; with bf16 the optimizer keeps fp32 master weights. Routers compute in fp32.
    With bf16 the gradients of a step's micro-batches are added up in bf16 too: prefer few, large micro-batches."""


@dataclass(frozen=True)
class Topology:
    """World size, expert-parallel size and number of experts that fit together.

    Ranks ``[i * P, (i + 1) * P)`` form expert-parallel group i (P = expert_parallel_size): together they hold all
    experts, rank r the ids of `experts_of_rank`. Ranks that are equal modulo P hold the same experts.
    """

    world_size: int
    expert_parallel_size: int
    num_experts: int

    @classmethod
    def create(cls, world_size: int, expert_parallel_size: int, num_experts: int) -> Topology:
        """Returns the topology.

        Raises:
            TopologyError: The sizes do not fit; the message lists those that do.
        """
        problem = topology_problem(world_size, expert_parallel_size, num_experts)
        if problem is not None:
            raise TopologyError(problem)
        return cls(world_size, expert_parallel_size, num_experts)

    @property
    def experts_per_rank(self) -> int:
        """Experts of one layer that one rank holds."""
        return self.num_experts // self.expert_parallel_size

    def experts_of_rank(self, rank: int) -> range:
        """Returns the global ids of the experts that a rank holds."""
        first = rank % self.expert_parallel_size * self.experts_per_rank
        return range(first, first + self.experts_per_rank)

    def describe(self) -> dict[str, int]:
        """Returns the sizes for the run's record."""
        return {
            "world_size": self.world_size,
            "expert_parallel_size": self.expert_parallel_size,
            "expert_data_parallel_size": self.world_size // self.expert_parallel_size,
            "num_experts": self.num_experts,
            "experts_per_rank": self.experts_per_rank,
        }


def valid_expert_parallel_sizes(world_size: int, num_experts: int) -> list[int]:
    """Returns every expert-parallel size that divides both the world size and the number of experts."""
    return [size for size in range(1, world_size + 1) if world_size % size == 0 and num_experts % size == 0]


def topology_problem(world_size: int, expert_parallel_size: int, num_experts: int) -> str | None:
    """Returns what is wrong with the sizes, or None."""
    valid = valid_expert_parallel_sizes(world_size, num_experts)
    if expert_parallel_size in valid:
        return None
    reasons = []
    if world_size % expert_parallel_size:
        reasons.append(f"it does not divide the {world_size} processes")
    if num_experts % expert_parallel_size:
        reasons.append(f"it does not divide the {num_experts} experts")
    return (
        f"expert_parallel_size {expert_parallel_size} is impossible: {' and '.join(reasons)}; "
        f"valid for {world_size} processes and {num_experts} experts: {', '.join(map(str, valid))}"
    )


def parallel_problems(config: ParallelConfig, world_size: int) -> list[tuple[str, str]]:
    """Returns (key, message) for each setting that cannot work, apart from the sizes."""
    problems = []
    if config.zero_stage == 3:
        problems.append(
            (
                "zero_stage",
                "stage 3 gathers each layer's parameters when it runs and hangs when ranks run different experts; "
                "use 0, 1 or 2 and spread experts with expert_parallel_size instead",
            )
        )
    if config.precision == "bf16" and config.zero_stage == 0 and config.engine == "deepspeed":
        problems.append(
            (
                "precision",
                "bf16 with zero_stage 0 is refused: DeepSpeed's unfused optimizer then takes an extra step with zero "
                "gradients and leaves expert gradients out of the norm; use zero_stage 1 (also for one process)",
            )
        )
    if config.engine == "local":
        if world_size != 1:
            problems.append(("engine", f"local runs in one process, not {world_size}; use deepspeed"))
        if config.precision != "fp32":
            problems.append(("engine", "local computes in fp32 only; use deepspeed for bf16"))
        if config.zero_stage != ParallelConfig.model_fields["zero_stage"].default:
            problems.append(("zero_stage", "has no effect with engine: local; leave it out"))
    return problems
