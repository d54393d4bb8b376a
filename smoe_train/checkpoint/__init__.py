"""Checkpoints: one topology-independent format, atomic and checksummed; DeepSpeed's own files are not written."""

from typing import TYPE_CHECKING

from smoe_train.checkpoint.config import CheckpointConfig
from smoe_train.lazy import lazy_attributes

if TYPE_CHECKING:
    from smoe_train.checkpoint.initial import CheckpointWeights, ExportedWeights, Weights, load_initial
    from smoe_train.checkpoint.manifest import Checkpoint
    from smoe_train.checkpoint.model_state import StateAccess, collect, load_weights, read_extra, restore
    from smoe_train.checkpoint.rank_state import seed_everything
    from smoe_train.checkpoint.store import CheckpointStore

__getattr__ = lazy_attributes(
    __name__,
    {
        "initial": ("CheckpointWeights", "ExportedWeights", "Weights", "load_initial"),
        "manifest": ("Checkpoint",),
        "model_state": ("StateAccess", "collect", "load_weights", "read_extra", "restore"),
        "rank_state": ("seed_everything",),
        "store": ("CheckpointStore",),
    },
)

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointStore",
    "CheckpointWeights",
    "ExportedWeights",
    "StateAccess",
    "Weights",
    "collect",
    "load_initial",
    "load_weights",
    "read_extra",
    "restore",
    "seed_everything",
]
