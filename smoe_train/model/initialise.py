"""Initial values keyed by (run seed, parameter name): the same model on any number of ranks, in any order."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smoe_train.routing import Draw as Draw


class KeyedDraw:
    """Normal values whose generator is seeded by a hash of (seed, module path, name).

    Args:
        seed: Run seed.
        path: Qualified name of the module that asks.
    """

    def __init__(self, seed: int, path: str) -> None:
        self._seed = seed
        self._path = path

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Returns fp32 CPU values from N(0, std^2)."""
        digest = hashlib.sha256(f"{self._seed}/{self._path}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        with torch.device("cpu"):
            return torch.empty(shape).normal_(0.0, std, generator=generator)


@runtime_checkable
class Initialisable(Protocol):
    """A module that sets its own initial values."""

    def initialise(self, draw: Draw) -> None:
        """Sets every parameter and buffer of its own."""
        ...


def set_values(parameter: Tensor, values: Tensor) -> None:
    """Copies initial values in, unless the parameter was loaded from a pretrained model."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(values)


def initialise_module(module: nn.Module, draw: Draw, linear_std: float) -> None:
    """Initialises one module without its children: its own way if it has one, else by its type."""
    if isinstance(module, Initialisable):
        tensors = [*module.parameters(), *module.buffers()]
        loaded = [(one, one.detach().clone()) for one in tensors if getattr(one, "_is_hf_initialized", False)]
        module.initialise(draw)
        with torch.no_grad():
            for tensor, values in loaded:  # a checkpoint may hold only some of a module's parameters and buffers
                tensor.copy_(values)
        return
    if isinstance(module, (nn.Linear, nn.Embedding)):
        set_values(module.weight, draw.normal("weight", tuple(module.weight.shape), linear_std))
        if isinstance(module, nn.Linear) and module.bias is not None:
            set_values(module.bias, torch.zeros(module.bias.shape))
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        set_values(module.weight, torch.ones(module.weight.shape))
        bias = getattr(module, "bias", None)
        if bias is not None:
            set_values(bias, torch.zeros(bias.shape))
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(module).__name__} holds parameters but does not say how to initialise them")


def initial_names(model: nn.Module) -> dict[int, str]:
    """Returns the qualified name of each module by id, without those that a module around them initialises."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, Initialisable):
            for child in module.modules():
                if child is not module:
                    names.pop(id(child), None)
    return names
