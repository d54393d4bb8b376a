"""What a run knows of itself besides tensors: saved with each checkpoint, restored on resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smoe_train.errors import CheckpointError


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        step: Optimizer steps taken; also the position in the data, whose order is a function of (seed, step).
        tokens: Tokens trained on.
        best_cost: Lowest cost of a validation so far: its loss, or the negative score of a classifier; None before the
            first.
        best_step: Its step.
        validated_step: Step of the newest validation; one that is due was interrupted if it is older.
        left_out: Steps, counted from 1, that pass without an update, since the run was taken back behind them.
        alarms: What the alarms remember of the steps so far.
    """

    step: int = 0
    tokens: int = 0
    best_cost: float | None = None
    best_step: int | None = None
    validated_step: int | None = None
    left_out: list[int] = field(default_factory=list)
    alarms: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the values as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """Returns the state that `to_json` wrote, also that of an older version, which knew less of itself.

        Raises:
            CheckpointError: It is none, whoever wrote it.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        try:
            # As JSON: strict, a dataclass is made of nothing but itself in Python.
            text = json.dumps({"validated_step": values["step"], **known})
            return TypeAdapter(cls).validate_json(text, strict=True)
        except (KeyError, ValidationError) as error:
            raise CheckpointError(f"the checkpoint's state of training is none: {error}; use another one") from error
