"""What a run knows of itself besides tensors."""

import json
import os
import signal

import pytest
from pydantic import ValidationError

from smoe_train.errors import CheckpointError
from smoe_train.training import EvaluationConfig, OptimizerConfig, TrainingConfig
from smoe_train.training.state import TrainState
from smoe_train.training.stop import StopRequest


@pytest.mark.parametrize("state", [TrainState(), TrainState(7, 1_000, 2.345678901234567, 6)])
def test_the_state_survives_json(state):
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainingConfig, {"max_steps": 0}),
        (TrainingConfig, {"gradient_clipping": 0.0}),
        (TrainingConfig, {"micro_batch_size": -1}),
        (OptimizerConfig, {"beta2": 1.0}),
        (OptimizerConfig, {"epsilon": 0.0}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (EvaluationConfig, {"every_steps": 0}),
        (EvaluationConfig, {"max_tokens": 0}),
    ],
)
def test_what_makes_no_sense_is_refused(kind, values):
    with pytest.raises(ValidationError):
        kind(**values)


@pytest.fixture
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_as_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second_ends", [True, False])
def test_a_signal_is_remembered_until_the_loop_looks(number, second_ends):
    stop = StopRequest()
    stop.listen(second_ends)
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    assert stop.signal == number
    for each in (signal.SIGINT, signal.SIGTERM):
        assert (signal.getsignal(each) is signal.SIG_DFL) == second_ends
    if not second_ends:
        os.kill(os.getpid(), number)
        assert stop.requested


@pytest.mark.parametrize("values", [{}, {"step": "2"}, {"step": 2, "tokens": None}, {"step": 2, "left_out": {"a": 1}}])
def test_a_state_of_another_form_is_refused(values):
    with pytest.raises(CheckpointError, match="state of training is none"):
        TrainState.from_json(values)
