"""Memory and traffic of one rank, against sums made by hand."""

import pytest

from smoe_train.parallel.footprint import Activations, contest_bytes, footprint
from smoe_train.parallel.topology import ParallelConfig

# 4 ranks in 2 expert-parallel groups, 2 MoE layers, 800 parameters in experts, 100 trained beside them, 7 frozen.
SIZES = {
    "world_size": 4,
    "expert_parameters": 800,
    "other_trainable": 100,
    "frozen": 7,
    "tokens_per_rank_and_step": 10,
    "d_model": 3,
    "moe_layers": 2,
    "top_k": 5,
}


def cost(sizes=SIZES, **parallel):
    return footprint(ParallelConfig(expert_parallel_size=2, **parallel), **sizes)


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "optimizer", "buffer"),
    [
        # A rank holds 400 + 100 trained parameters; of their state it owns 400/2 + 100/4 = 225.
        ({"zero_stage": 0}, 507 * 4, 500 * 4, 500 * 8, 0),
        ({"zero_stage": 1}, 507 * 4, 500 * 4, 225 * 12, 500 * 4),
        ({"zero_stage": 2}, 507 * 4, 225 * 4, 225 * 12, 500 * 4),
        ({"zero_stage": 1, "precision": "bf16"}, 507 * 2, 500 * 2, 225 * 12, 500 * 2),
        ({"zero_stage": 2, "precision": "bf16"}, 507 * 2, 225 * 2, 225 * 12, 500 * 2),
    ],
)
def test_memory(parallel, weights, gradients, optimizer, buffer):
    found = cost(**parallel)
    assert (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes) == (weights, gradients, optimizer)
    assert found.reduction_buffer_bytes == buffer
    # Without activations the step is the peak: gradients of the largest group, here experts, are copied, bf16 to fp32.
    assert found.step_copies_bytes == (0 if not buffer else 200 * (6 if parallel.get("precision") == "bf16" else 4))
    assert found.peak_bytes == weights + optimizer + gradients + max(buffer, found.step_copies_bytes)
    assert found.model_state_bytes == weights + gradients + optimizer + buffer


def test_the_local_engine_keeps_everything_and_sends_nothing():
    found = footprint(ParallelConfig(engine="local"), **{**SIZES, "world_size": 1})
    assert (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes) == (907 * 4, 900 * 4, 900 * 8)
    assert found.all_to_all_bytes_per_step == 0


# 10 tokens of 3 values, one dense layer of 4 hidden values: 8 x 3 + 2 x 3 + 4 + 2 x 3 a token, and 4 gradients.
ACTIVATIONS = Activations(10, 3, 1, 0, 1, 4, 1, "relu", 0)
OF_THEM = 400 * 4 + 160


@pytest.mark.parametrize(
    ("trained", "steps", "gradients_and_activations"),
    [
        (100, 1, OF_THEM),  # gradients come as activations go
        (1000, 1, 4000),
        (100, 2, OF_THEM + 400),  # those of the micro-batches before stay
    ],
)
def test_the_peak_is_that_of_gradients_or_activations(trained, steps, gradients_and_activations):
    sizes = {**SIZES, "world_size": 1, "expert_parameters": 0, "other_trainable": trained, "frozen": 0}
    found = footprint(ParallelConfig(engine="local"), **sizes, activations=ACTIVATIONS, accumulation_steps=steps)
    assert found.activation_bytes == OF_THEM
    assert found.peak_bytes == trained * 12 + gradients_and_activations


@pytest.mark.parametrize(("precision", "element"), [("fp32", 4), ("bf16", 2)])
def test_traffic(precision, element):
    # There, back, and both gradients: 10 tokens to 5 experts, half of which are on the other rank, in 2 layers.
    assert cost(precision=precision).all_to_all_bytes_per_step == 4 * 10 * 5 * 3 * element * 2 // 2


def test_json_has_every_figure():
    found = cost()
    assert found.to_json() == {
        "weights_bytes": found.weights_bytes,
        "gradients_bytes": found.gradients_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "reduction_buffer_bytes": found.reduction_buffer_bytes,
        "step_copies_bytes": found.step_copies_bytes,
        "activation_bytes": 0,
        "peak_bytes": found.peak_bytes,
        "all_to_all_bytes_per_step": found.all_to_all_bytes_per_step,
        "model_state_bytes": found.model_state_bytes,
    }


def test_a_contest_by_hand():
    """10 tokens of 3 bf16 values, 8 experts on 4 ranks, 4 winners.

    Each of the 3 others gets 6 bytes of values, 2 fp32 responses and 4 int32 winners a token; of 4 outputs of 6 bytes
    3 come from elsewhere. Values, responses and outputs go twice.
    """
    assert contest_bytes(10, 3, 8, 4, 4, 2) == 10 * (2 * (3 * (6 + 8) + 4 * 6 * 3 // 4) + 3 * 16)
    assert contest_bytes(10, 3, 8, 4, 1, 2) == 0
