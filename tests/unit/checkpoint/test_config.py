"""The recipe's checkpoint section."""

import pytest
from pydantic import ValidationError

from smoe_train.checkpoint import CheckpointConfig


@pytest.mark.parametrize("values", [{"every_steps": 0}, {"keep_last": 0}, {"every_step": 1}, {"keep_last": True}])
def test_what_makes_no_sense_is_refused(values):
    with pytest.raises(ValidationError):
        CheckpointConfig(**values)
