"""Collects what the steps of a window produced, on the device, and reads it with one synchronisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smoe_train.evaluation import StatSums, add_stats
from smoe_train.reporting.routing_health import routing_record
from smoe_train.training.objectives import Objective


class Meter:
    """Losses of each step and routing sums of the window since it was last read.

    Args:
        num_ranks: Data-parallel ranks; losses are their means.
        sum_over_ranks: Adds a tensor up over the ranks.
        coefficients: Coefficient of each auxiliary loss.
    """

    def __init__(
        self, num_ranks: int, sum_over_ranks: Callable[[Tensor], Tensor], coefficients: Mapping[str, float]
    ) -> None:
        self._num_ranks = num_ranks
        self._sum = sum_over_ranks
        self._coefficients = coefficients
        self._micro: list[dict[str, Tensor]] = []
        self._totals: list[Tensor] = []
        self._losses: list[dict[str, Tensor]] = []
        self._facts: list[dict[str, Any]] = []
        self._sent_bytes: list[int] = []
        self._weights: list[Mapping[str, float]] = []
        self._step_stats: StatSums = {}
        self._routing: StatSums = {}
        self._start = time.perf_counter()

    def add(self, objective: Objective) -> None:
        """Takes in one micro-batch."""
        router_losses = {name: value.detach() for name, value in (objective.output.router_losses or {}).items()}
        self._totals.append(objective.total.detach())
        self._micro.append({"loss": objective.task.detach(), **router_losses})
        add_stats(self._step_stats, objective.output.routing_stats)

    def step_is_finite(self) -> bool:
        """Returns whether what is trained on in the step so far is finite on this rank; waits for the device."""
        return bool(torch.stack(self._totals).isfinite().all())

    def end_step(self, facts: Mapping[str, Any], weights: Mapping[str, float], sent_bytes: int = 0) -> StatSums:
        """Closes a step: its losses are the means over its micro-batches.

        Args:
            facts: What else to record of the step; tensors are read when the window is. With a true ``skipped`` the
                step does not count in the routing of the window.
            weights: The curriculum's factors on the coefficients of auxiliary losses in this step.
            sent_bytes: What this rank sent to experts on other ranks and back, see `smoe_train.parallel.traffic`.

        Returns:
            The step's routing sums of this rank by layer.
        """
        count = len(self._micro)
        self._losses.append({name: sum_of(self._micro, name) / count for name in self._micro[0]})
        self._facts.append(dict(facts))
        self._weights.append(weights)
        self._sent_bytes.append(sent_bytes)
        stats, self._step_stats, self._micro, self._totals = self._step_stats, {}, [], []
        if facts.get("skipped"):  # its routing is that of a fault, or was judged when training was taken back
            return stats
        add_stats(self._routing, stats)
        # k may change within the window; a policy that uses fewer slots on purpose says how many it wanted.
        wanted = {layer: sums["tokens"] * facts["top_k"] for layer, sums in stats.items() if "wanted_slots" not in sums}
        add_stats(self._routing, {layer: {"wanted_slots": slots} for layer, slots in wanted.items()})
        return stats

    def read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns one record a step and one routing record a layer, over all ranks, and starts a new window."""
        steps: list[dict[str, Any]] = []
        if not self._losses:
            return steps, []
        names = list(self._losses[0])
        table = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self._losses])
        sent = torch.tensor(self._sent_bytes, dtype=table.dtype, device=table.device).unsqueeze(1)
        rows = (self._sum(torch.cat([table, sent], dim=1)) / self._num_ranks).tolist()
        seconds = (time.perf_counter() - self._start) / len(rows)
        for facts, weights, (*row, sent_bytes) in zip(self._facts, self._weights, rows, strict=True):
            values = dict(zip(names, row, strict=True))
            record = {key: float(value) if isinstance(value, Tensor) else value for key, value in facts.items()}
            record |= values
            record |= {"expert_parallel_bytes": sent_bytes} if sent_bytes else {}
            record |= {
                f"{name}_weighted": self._coefficients[name] * weights.get(name, 1.0) * values[name]
                for name in names
                if name != "loss"
            }
            steps.append({**record, "step_seconds": seconds})
        routing = routing_records(self._routing, int(self._facts[-1]["top_k"]), self._sum)
        self._losses, self._facts, self._weights, self._sent_bytes, self._routing = [], [], [], [], {}
        self._start = time.perf_counter()
        return steps, routing

    def pause(self) -> None:
        """Starts the clock anew, so that validation and saving do not count as training time."""
        self._start = time.perf_counter()


def sum_of(items: list[dict[str, Tensor]], name: str) -> Tensor:
    """Returns the sum of one entry over the items."""
    return torch.stack([item[name] for item in items]).sum(dim=0)


def routing_records(sums: StatSums, top_k: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """Returns one record a layer from this rank's sums, with one reduction for all of them."""
    keys = [(layer, name) for layer in sorted(sums) for name in sorted(sums[layer])]
    if not keys:
        return []
    flat = torch.cat([sums[layer][name].reshape(-1).float() for layer, name in keys])
    values = iter(sum_over_ranks(flat).tolist())
    layers: dict[int, dict[str, Any]] = {}
    for layer, name in keys:
        tensor = sums[layer][name]
        numbers = [next(values) for _ in range(tensor.numel())]
        layers.setdefault(layer, {})[name] = numbers if tensor.dim() else numbers[0]
    return [{"layer": layer, **routing_record(numbers, top_k)} for layer, numbers in layers.items()]
