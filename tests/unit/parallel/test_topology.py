"""Which rank holds which expert, which sizes are possible, and that no torch is needed to know."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.errors import TopologyError
from smoe_train.parallel.topology import (
    ParallelConfig,
    Topology,
    parallel_problems,
    topology_problem,
    valid_expert_parallel_sizes,
)


@pytest.mark.parametrize(
    ("world_size", "num_experts", "sizes"),
    [
        (1, 8, [1]),
        (2, 8, [1, 2]),
        (4, 6, [1, 2]),
        (6, 9, [1, 3]),
        (8, 8, [1, 2, 4, 8]),
        (7, 8, [1]),
        (4, 1, [1]),
        (12, 18, [1, 2, 3, 6]),
    ],
)
def test_valid_sizes(world_size, num_experts, sizes):
    assert valid_expert_parallel_sizes(world_size, num_experts) == sizes


def test_layout_of_four_ranks_in_two_groups():
    topology = Topology.create(4, 2, 6)
    assert [list(topology.experts_of_rank(rank)) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert topology.describe() == {
        "world_size": 4,
        "expert_parallel_size": 2,
        "expert_data_parallel_size": 2,
        "num_experts": 6,
        "experts_per_rank": 3,
    }


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_group_holds_every_expert_once_in_order(num_groups, size, experts_per_rank):
    world_size, num_experts = num_groups * size, experts_per_rank * size
    assert size in valid_expert_parallel_sizes(world_size, num_experts)
    topology = Topology.create(world_size, size, num_experts)
    for first in range(0, world_size, size):
        held = [expert for rank in range(first, first + size) for expert in topology.experts_of_rank(rank)]
        assert held == list(range(num_experts))


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 64))
def test_a_size_is_impossible_exactly_if_it_leaves_a_remainder(world_size, size, num_experts):
    problem = topology_problem(world_size, size, num_experts)
    assert (problem is None) == (world_size % size == 0 and num_experts % size == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4, 3, 9),
            "expert_parallel_size 3 is impossible: it does not divide the 4 processes; "
            "valid for 4 processes and 9 experts: 1",
        ),
        (
            (4, 4, 6),
            "expert_parallel_size 4 is impossible: it does not divide the 6 experts; "
            "valid for 4 processes and 6 experts: 1, 2",
        ),
        (
            (2, 5, 8),
            "expert_parallel_size 5 is impossible: it does not divide the 2 processes and it does not divide the "
            "8 experts; valid for 2 processes and 8 experts: 1, 2",
        ),
    ],
)
def test_an_impossible_topology_says_why_and_what_is_possible(arguments, message):
    with pytest.raises(TopologyError) as caught:
        Topology.create(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "world_size", "keys"),
    [
        ({}, 1, []),
        ({}, 8, []),
        ({"zero_stage": 2, "precision": "bf16"}, 8, []),
        ({"zero_stage": 0}, 8, []),
        ({"zero_stage": 3}, 8, ["zero_stage"]),
        ({"zero_stage": 0, "precision": "bf16"}, 1, ["precision"]),
        ({"engine": "local"}, 1, []),
        ({"engine": "local"}, 2, ["engine"]),
        ({"engine": "local", "precision": "bf16"}, 1, ["engine"]),
        ({"engine": "local", "zero_stage": 0}, 1, ["zero_stage"]),
        (
            {"engine": "local", "zero_stage": 3, "precision": "bf16"},
            2,
            ["zero_stage", "engine", "engine", "zero_stage"],
        ),
    ],
)
def test_settings_that_cannot_work(values, world_size, keys):
    assert [key for key, _ in parallel_problems(ParallelConfig(**values), world_size)] == keys


def test_knowing_the_topology_needs_no_torch():
    program = "import sys, smoe_train.parallel.topology, smoe_train.parallel.footprint; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
