"""This process among its peers: start, meet, exchange small objects, stop. Works for one process without a launcher."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from smoe_train.errors import LaunchError
from smoe_train.parallel.rendezvous import meet

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# The most there is: torch's sockets take milliseconds as a 32-bit number, of a longer time what is left of it.
FOREVER = timedelta(days=24)


@dataclass(frozen=True)
class Process:
    """A started process.

    Attributes:
        rank: Global rank.
        local_rank: Rank on this host.
        world_size: Number of processes.
        device: Where this process computes.
        control: Process group for small messages between hosts' memories, so that they never wait for a device.
        collective_timeout: How long a collective waits for peers.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any = None
    collective_timeout: timedelta = COLLECTIVE_TIMEOUT

    @classmethod
    def alone(cls) -> Process:
        """One process without a process group and without DeepSpeed, on the accelerator if there is one."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return cls(0, 0, 1, accelerator or torch.device("cpu"))

    @classmethod
    def start(cls, collective_timeout: timedelta = COLLECTIVE_TIMEOUT) -> Process:
        """Joins the process group that RANK, WORLD_SIZE, ... describe, or one of this process if they are not set.

        Args:
            collective_timeout: How long a collective waits for peers; a watchdog says better who is missing.

        Raises:
            LaunchError: Variables are missing, peers do not come, or this host has no such accelerator.
        """
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
        if launched and missing:
            raise LaunchError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} not: start workers with a launcher"
            )
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find, without its warning
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").addFilter(_is_news)
        accelerator = get_accelerator()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu")
        if accelerator.device_name() != "cpu":
            if local_rank >= accelerator.device_count():
                raise LaunchError(
                    f"local rank {local_rank}: this host has {accelerator.device_count()} accelerator(s); "
                    "start at most as many processes a host"
                )
            accelerator.set_device(local_rank)
            device = torch.device(accelerator.device_name(local_rank))
        if not dist.is_initialized():
            backend = accelerator.communication_backend_name()
            if launched:
                store = meet(os.environ)
                rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world_size, timeout=collective_timeout
                )
            else:
                os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engine insists on it
                alone = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        # DeepSpeed would compile an inference-only shared-memory operator here, which needs a compiler and up to
        # two minutes, and whose lock file blocks later runs if it is killed. Training never uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        control = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=collective_timeout)
        return cls(dist.get_rank(), local_rank, dist.get_world_size(), device, control, collective_timeout)

    def share_timeout(self) -> None:
        """Gives all process groups there are the collective timeout: DeepSpeed makes its own without one."""
        if dist.is_initialized():
            for group in distributed_c10d._world.pg_map:
                distributed_c10d._set_pg_timeout(self.collective_timeout, group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes records and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a detached tensor over all ranks."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank; waits for the other hosts, not for a device."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Returns of each flag whether it is set on any rank, in one exchange."""
        if self.world_size == 1:
            return list(flags)
        totals = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(totals, group=self.control)
        return [total > 0 for total in totals.tolist()]

    def gather_objects(self, item: Any) -> list[Any]:
        """Returns every rank's object, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def broadcast_object(self, item: Any) -> Any:
        """Returns rank 0's object on every rank."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.control)
        return items[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def stop(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's is to be shown: of steps that are not finite the trainer says more."""
    return "OVERFLOW!" not in record.getMessage()
