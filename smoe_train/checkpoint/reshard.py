"""A checkpoint in the files that another topology would have written; no bit of a tensor changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smoe_train.checkpoint.damage import EXPERT_TENSOR
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.checkpoint.model_state import SHARED_FILE, experts_file, rank_file
from smoe_train.parallel.topology import Topology

RANDOM = "random/"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is written from.

    Attributes:
        files: Tensors by name, by file.
        state: What to store besides tensors, JSON values.
    """

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def reshard(checkpoint: Checkpoint, topology: Topology) -> Contents:
    """Returns a checkpoint as ranks of another topology would write it.

    Generators of ranks that there are no more are left out; a rank that there was not seeds its own when it loads.
    """
    names = [name for name in checkpoint.tensors if _rank_of(name) < topology.world_size]
    files = {file: checkpoint.read(held) for file, held in files_of(names, topology).items()}
    sizes = {"world_size": topology.world_size, "expert_parallel_size": topology.expert_parallel_size}
    return Contents(files, {**checkpoint.state, **sizes})


def files_of(names: Iterable[str], topology: Topology) -> dict[str, list[str]]:
    """Returns which tensors each file of a checkpoint holds that is written by a topology."""
    files: dict[str, list[str]] = {}
    for name in names:
        expert = EXPERT_TENSOR.match(name)
        if name.startswith(RANDOM):
            file = rank_file(_rank_of(name))
        elif expert is None:
            file = SHARED_FILE
        else:
            file = experts_file(topology.experts_of_rank(int(expert["expert"]) // topology.experts_per_rank))
        files.setdefault(file, []).append(name)
    return files


def _rank_of(name: str) -> int:
    """Returns the rank whose generators a tensor belongs to; 0, which there always is, for all others."""
    return int(name.split("/")[1]) if name.startswith(RANDOM) else 0
