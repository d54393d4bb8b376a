"""Weights that a run starts with: of another run's checkpoint, or of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smoe_train.bounded import read_json
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.checkpoint.model_state import parameters_of, read_parameter, saved_buffers
from smoe_train.errors import CheckpointError
from smoe_train.model import SmoeForSequenceClassification, SmoePreTrainedModel, StackedExperts
from smoe_train.routing import Router

CLASSIFIER_HEAD = "score."


class Weights(Protocol):
    """Weights and buffers by the names that they have in a model."""

    def parameter(self, name: str, parameter: nn.Parameter, owner: StackedExperts | None) -> Tensor:
        """Returns the values of a parameter, of stacked experts those that ``owner`` holds."""
        ...

    def buffer(self, name: str) -> Tensor:
        """Returns the values of a buffer."""
        ...


class CheckpointWeights:
    """The weights in a checkpoint.

    Args:
        checkpoint: Verified.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def parameter(self, name: str, parameter: nn.Parameter, owner: StackedExperts | None) -> Tensor:
        """Returns the values of a parameter."""
        return read_parameter(self._checkpoint, "weight", name, parameter, owner)

    def buffer(self, name: str) -> Tensor:
        """Returns the values of a buffer."""
        return self._checkpoint.tensor(f"buffer/{name}")


class ExportedWeights:
    """The weights in a folder that transformers can load.

    Args:
        folder: Holds ``model.safetensors``, or its parts with ``model.safetensors.index.json``.

    Raises:
        CheckpointError: There are no weights, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self._files = {str(k): str(v) for k, v in read_json(index)["weight_map"].items()}
            else:
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
        if any(Path(name).name != name for name in self._files.values()):
            raise CheckpointError(f"{index}: names a file outside its folder")

    def parameter(self, name: str, parameter: nn.Parameter, owner: StackedExperts | None) -> Tensor:
        """Returns the values of a parameter."""
        value = self._read(name, owner.expert_ids if owner is not None else None)
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{self._folder}: {name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}; it "
                "belongs to another model"
            )
        return value

    def buffer(self, name: str) -> Tensor:
        """Returns the values of a buffer."""
        return self._read(name, None)

    def _read(self, name: str, rows: range | None) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self._folder}: holds no tensor {name!r}; it belongs to another model")
        try:
            with safe_open(self._folder / self._files[name], framework="pt") as file:
                part = file.get_slice(name)
                value: Tensor = part[:] if rows is None else part[rows.start : rows.stop]
                return value
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / self._files[name]}: cannot be read: {error}") from error


def load_initial(model: SmoePreTrainedModel, weights: Weights, new_routers: bool = False) -> None:
    """Loads what a model has in common with others into it, before it is given to an engine.

    That is all but a classifier's head and, if asked for, the routers.

    Raises:
        CheckpointError: The weights belong to another model; the message names the tensor.
    """
    routers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Router))

    def stays_new(name: str) -> bool:
        is_head = isinstance(model, SmoeForSequenceClassification) and name.startswith(CLASSIFIER_HEAD)
        return is_head or (new_routers and name.startswith(routers))

    try:
        with torch.no_grad():
            for name, parameter, owner in parameters_of(model):
                if not stays_new(name):
                    parameter.copy_(weights.parameter(name, parameter, owner))
            for name, buffer in saved_buffers(model):
                if not stays_new(name):
                    buffer.copy_(weights.buffer(name))
        for router in model.routers().values():
            router.begin_anew()
    except CheckpointError as error:
        if not new_routers and any(name in str(error) for name in routers):
            raise CheckpointError(f"{error}; initialise.router=new starts with new routers") from error
        raise
