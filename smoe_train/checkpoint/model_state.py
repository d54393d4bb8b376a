"""A model and its optimizer as tensors that do not depend on the topology, and back.

Tensor names: ``weight/<parameter>``, ``exp_avg/<parameter>``, ``exp_avg_sq/<parameter>``, ``buffer/<buffer>``,
``random/<rank>/<generator>``. Experts are stored one by one, ``<bank>.experts.<global id>.<name>``, so that any number
of ranks can pick those it holds. Weights are the fp32 masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.checkpoint.rank_state import capture_random_state, restore_random_state, seed_everything
from smoe_train.errors import CheckpointError
from smoe_train.model import StackedExperts

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHARED_FILE = "shared.safetensors"


class StateAccess(Protocol):
    """What an engine offers so that its state can be saved; see `DeepSpeedEngine`."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        ...

    def read_state(self, parameter: nn.Parameter, copy: bool = True) -> dict[str, Tensor]:
        """Returns a parameter's fp32 weight and moments; every rank calls it for every parameter in order.

        Args:
            parameter: Of the model.
            copy: Whether they must stay as they are when training goes on.
        """
        ...

    def optimizer_steps(self) -> int:
        """Returns how many steps the optimizer has taken."""
        ...

    def start_loading(self, optimizer_steps: int) -> None:
        """Creates optimizer state to write to."""
        ...

    def write_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Puts a parameter's weight and moments back."""
        ...


def collect(
    engine: StateAccess,
    rank: int,
    expert_parallel_size: int,
    device: torch.device,
    extra: Mapping[str, Tensor] | None = None,
    copy: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Returns the files that this rank writes, by name, with their tensors.

    Rank 0 writes what all ranks share, the first expert-parallel group the experts, every rank its generators. All
    ranks must call it: under ZeRO, reading a parameter is a collective. All tensors are in host memory, and with
    ``copy`` copies, which training does not change. ``extra`` is what else is to be saved, the same on every rank;
    `read_extra` returns it.
    """
    shared: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    held = range(0)
    for name, parameter, owner in parameters_of(engine.model):
        for kind, value in engine.read_state(parameter, copy).items():
            if owner is None:
                if rank == 0:
                    shared[f"{kind}/{name}"] = value.cpu()
            elif rank < expert_parallel_size:
                held = owner.expert_ids
                for expert, one in zip(owner.expert_ids, value.cpu().unbind(0), strict=True):
                    experts[f"{kind}/{expert_name(name, expert)}"] = one
    files: dict[str, dict[str, Tensor]] = {}
    if rank == 0:
        shared |= {f"buffer/{name}": _copy(buffer) for name, buffer in saved_buffers(engine.model)}
        shared |= {f"extra/{name}": _copy(value) for name, value in (extra or {}).items()}
        files[SHARED_FILE] = shared
    if experts:
        files[experts_file(held)] = experts
    random_state = capture_random_state(device)
    files[rank_file(rank)] = {f"random/{rank}/{key}": value for key, value in random_state.items()}
    return files


def experts_file(experts: range) -> str:
    """Returns the name of the file that holds these experts, by global id, of all layers."""
    return f"experts-{experts.start:05d}-{experts.stop - 1:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Returns the name of the file that holds a rank's generators."""
    return f"rank-{rank:05d}.safetensors"


def restore(engine: StateAccess, checkpoint: Checkpoint, rank: int, seed: int, device: torch.device) -> None:
    """Puts weights, moments, buffers and generators back, whatever topology wrote them.

    A rank that did not exist when the checkpoint was written seeds its generators anew.

    Raises:
        CheckpointError: The checkpoint belongs to another model; the message names the tensor.
    """
    engine.start_loading(int(checkpoint.state["optimizer_steps"]))
    for name, parameter, owner in parameters_of(engine.model):
        kinds = KINDS if parameter.requires_grad and int(checkpoint.state["optimizer_steps"]) else KINDS[:1]
        values = {kind: read_parameter(checkpoint, kind, name, parameter, owner) for kind in kinds}
        engine.write_state(parameter, values)
    _restore_buffers(engine.model, checkpoint)
    prefix = f"random/{rank}/"
    state = {
        name.removeprefix(prefix): checkpoint.tensor(name) for name in checkpoint.tensors if name.startswith(prefix)
    }
    if state:
        restore_random_state(state, device)
    else:
        seed_everything(seed + checkpoint.step, rank)


def read_extra(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Returns those extra tensors of a checkpoint whose names begin with a prefix, by the rest of their names."""
    prefix = f"extra/{prefix}"
    return {
        name.removeprefix(prefix): checkpoint.tensor(name) for name in checkpoint.tensors if name.startswith(prefix)
    }


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads weights and buffers, without optimizer state, into a model in this process.

    Raises:
        CheckpointError: The checkpoint belongs to another model; the message names the tensor.
    """
    with torch.no_grad():
        for name, parameter, owner in parameters_of(model):
            parameter.copy_(read_parameter(checkpoint, "weight", name, parameter, owner))
    _restore_buffers(model, checkpoint)


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, StackedExperts | None]]:
    """Yields each parameter's name, itself and the stack of experts that it belongs to, in a fixed order."""
    owners = {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if isinstance(module, StackedExperts)
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        yield name, parameter, owners.get(name)


def expert_name(name: str, expert: int) -> str:
    """Returns the name in checkpoints of one expert's part of a stacked parameter."""
    bank, _, tensor = name.rpartition(".")
    return f"{bank}.{expert}.{tensor}"


def read_parameter(
    checkpoint: Checkpoint, kind: str, name: str, parameter: nn.Parameter, owner: StackedExperts | None
) -> Tensor:
    """Returns a parameter's weight or moment, of stacked experts those that ``owner`` holds.

    Raises:
        CheckpointError: There is none of this name and shape.
    """
    if owner is None:
        value = checkpoint.tensor(f"{kind}/{name}")
    else:
        names = [f"{kind}/{expert_name(name, expert)}" for expert in owner.expert_ids]
        value = torch.stack([checkpoint.tensor(one) for one in names])
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{checkpoint.path}: {kind} of {name} has shape {tuple(value.shape)}, the model needs "
            f"{tuple(parameter.shape)}; it belongs to another model"
        )
    return value


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the persistent buffers by name."""
    persistent = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def _restore_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        for name, buffer in saved_buffers(model):
            buffer.copy_(checkpoint.tensor(f"buffer/{name}"))
