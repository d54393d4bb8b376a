"""Where weights come from: a run, one of its checkpoints, or an exported folder, and what model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoe_train.bounded import read_json
from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST, find_checkpoint
from smoe_train.config import path_problem, read_values
from smoe_train.errors import CheckpointError, RecipeError
from smoe_train.model.config import section_of
from smoe_train.routing import ROUTERS

RECIPE = "recipe.yaml"  # in a run folder, resolved
TOKENIZER = "tokenizer"  # in run folders, checkpoints and exported folders
EXPORTED_CONFIG = "config.json"


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from.

    Attributes:
        folder: The checkpoint, or the exported folder.
        is_checkpoint: Whether it is a checkpoint of this package.
        model: The recipe's model section that the weights belong to.
    """

    folder: Path
    is_checkpoint: bool
    model: Mapping[str, Any]

    def inherited_model(self, new_routers: bool) -> dict[str, Any]:
        """Returns the model section of a run that starts from the weights, without what spoke of their training.

        Args:
            new_routers: Whether their routers are not loaded; such options then have their defaults.
        """
        moe = dict(self.model.get("moe") or {})
        router = moe.get("router")
        if not isinstance(router, Mapping):
            return dict(self.model)
        return {**self.model, "moe": {**moe, "router": _carried_on(router, new_routers)}}

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""
        return self.folder / TOKENIZER


def options_of_training(router: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a router that speak of one training, by dotted name; see `RouterConfig.when_loaded`."""
    name, base = str(router.get("type")), router.get("base")
    found = dict(ROUTERS.get(name).config.when_loaded) if name in ROUTERS.names() else {}
    below = options_of_training(base) if isinstance(base, Mapping) else {}
    return found | {f"base.{key}": value for key, value in below.items()}


def _carried_on(router: Mapping[str, Any], new: bool) -> dict[str, Any]:
    own = {name: value for name, value in options_of_training(router).items() if "." not in name}
    found = {name: value for name, value in router.items() if name not in own} | ({} if new else own)
    base = router.get("base")
    return found | ({"base": _carried_on(base, new)} if isinstance(base, Mapping) else {})


def tokenizer_of(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's tokenizer.

    Raises:
        CheckpointError: It has none.
    """
    folder = checkpoint / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint}: holds no tokenizer; it is damaged, or of an earlier version, which kept none: resume its "
            "run for a step more, whose checkpoint will hold one"
        )
    return folder


def find_pretrained(path: Path, which: str) -> Pretrained:
    """Returns what lies at a path, without reading weights.

    Args:
        path: A run folder, one of its checkpoints, or an exported folder.
        which: ``best`` or ``latest``, for a run folder.

    Raises:
        CheckpointError: There is nothing of the kind, or it cannot be read.
    """
    if (problem := path_problem(path)) is not None:
        raise CheckpointError(f"{path}: {problem}; correct the path")
    path = path.expanduser()
    if (path / MANIFEST).is_file():
        tokenizer_of(path)
        return Pretrained(path, True, _model_of_run(path.resolve().parent.parent))
    if (path / RECIPE).is_file():
        checkpoint = find_checkpoint(path / CHECKPOINTS, which)
        tokenizer_of(checkpoint)
        return Pretrained(checkpoint, True, _model_of_run(path))
    if (path / EXPORTED_CONFIG).is_file():
        return Pretrained(path, False, _model_of_export(path / EXPORTED_CONFIG))
    raise CheckpointError(
        f"{path}: is neither a run folder, nor a complete checkpoint, nor an exported folder; "
        "give the path of one of them, e.g. runs/<name>. A run that has begun goes on without: train its recipe.yaml"
    )


def _model_of_run(folder: Path) -> dict[str, Any]:
    try:
        values = read_values(folder / RECIPE)
    except RecipeError as error:
        raise CheckpointError(f"{folder / RECIPE}: is not the recipe of a run: {error}") from error
    model = dict(values.get("model") or {})
    if model.get("max_sequence_length") is None:
        model["max_sequence_length"] = (values.get("training") or {}).get("sequence_length")
    return model


def _model_of_export(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
        if values.get("model_type") != "smoe":
            raise CheckpointError(
                f"{path}: describes a model of type {values.get('model_type')!r}; weights can be taken from a 'smoe' "
                "model alone"
            )
        return section_of(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not the configuration of an exported model: {error!r}") from error
