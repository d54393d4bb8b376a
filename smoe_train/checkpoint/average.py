"""The mean of several checkpoints' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smoe_train.checkpoint.damage import EXPERT_TENSOR
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.checkpoint.reshard import Contents, files_of
from smoe_train.errors import CheckpointError
from smoe_train.parallel.topology import Topology

AVERAGE_OF = "average_of"  # key of a checkpoint's state: what it is the average of


def average(checkpoints: Sequence[Checkpoint]) -> Contents:
    """Returns the mean of the weights, summed in fp64, as a checkpoint that one process writes.

    Moments belong to one path of training and are left out, and so are generators; buffers (counts of routers, the
    bits of a bias) have no mean and are the newest checkpoint's, whose state it takes over otherwise.

    Args:
        checkpoints: Two or more, verified.

    Raises:
        CheckpointError: They are of different models or tokenizers.
    """
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    for checkpoint in checkpoints:
        _require_same_model(newest, checkpoint)
    names = [name for name in newest.tensors if name.startswith(("weight/", "buffer/"))]
    experts = [int(match["expert"]) for match in map(EXPERT_TENSOR.match, names) if match is not None]
    one_process = Topology(1, 1, max(experts, default=0) + 1)
    files = {file: _mean(newest, checkpoints, held) for file, held in files_of(names, one_process).items()}
    train = {**newest.state["train"], "best_cost": None, "best_step": None, "alarms": {}}
    sizes = {"world_size": 1, "expert_parallel_size": 1}
    origins = [{"path": str(checkpoint.path), "step": checkpoint.step} for checkpoint in checkpoints]
    state: dict[str, Any] = {**newest.state, **sizes, "train": train, "optimizer_steps": 0, AVERAGE_OF: origins}
    return Contents(files, state)


def _mean(newest: Checkpoint, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> dict[str, Tensor]:
    found = newest.read(names)
    weights = [name for name in names if name.startswith("weight/")]
    totals = {name: torch.zeros_like(found[name], dtype=torch.float64) for name in weights}
    for checkpoint in checkpoints:
        for name, value in checkpoint.read(weights).items():
            if value.shape != found[name].shape:
                shapes = f"{tuple(value.shape)}, in {newest.path} {tuple(found[name].shape)}"
                raise CheckpointError(f"{checkpoint.path}: {name} has shape {shapes}: they are of different models")
            totals[name] += value
    return found | {name: (total / len(checkpoints)).to(found[name].dtype) for name, total in totals.items()}


def _require_same_model(newest: Checkpoint, other: Checkpoint) -> None:
    ours, theirs = (
        {key: value for key, value in one.state.get("identity", {}).items() if key.startswith(("model.", "tokenizer"))}
        for one in (newest, other)
    )
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        texts = "; ".join(f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}" for key in different)
        raise CheckpointError(
            f"{other.path}: is of another model than {newest.path}: {texts}; average those of one model"
        )
    weights, others = ({name for name in one.tensors if name.startswith("weight/")} for one in (newest, other))
    if weights != others:
        name = sorted(weights ^ others)[0]
        raise CheckpointError(f"{other.path}: is of another model than {newest.path}: one of them has no {name}")
