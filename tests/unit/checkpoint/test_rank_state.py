"""The generators of one process: captured and restored bit by bit."""

# ruff: noqa: NPY002 - the legacy global generator is what is captured

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smoe_train.checkpoint.rank_state import capture_random_state, restore_random_state, seed_everything

CPU = torch.device("cpu")


def draw():
    return (
        [random.random() for _ in range(3)],
        random.gauss(0.0, 1.0).hex(),
        np.random.standard_normal(3).tobytes(),
        np.random.randint(0, 2**31, 700).tobytes(),
        torch.rand(5).numpy().tobytes(),
        torch.randn(17).numpy().tobytes(),
    )


@pytest.fixture(autouse=True)
def generators_as_before():
    state = capture_random_state(CPU)
    yield
    restore_random_state(state, CPU)


@pytest.mark.parametrize("draws_before", [0, 1, 2])
def test_every_generator_goes_on_where_it_was_captured(tmp_path, draws_before):
    seed_everything(3, 0)
    for _ in range(draws_before):
        random.gauss(0.0, 1.0)  # gauss and standard_normal keep the second of a pair back
        np.random.standard_normal(1)
        torch.randn(1)
    save_file(capture_random_state(CPU), tmp_path / "state.safetensors")
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    seed_everything(99, 5)
    restore_random_state(load_file(tmp_path / "state.safetensors"), CPU)
    assert [draw(), draw()] == expected


def test_capturing_draws_nothing():
    seed_everything(3, 0)
    expected = draw()
    seed_everything(3, 0)
    capture_random_state(CPU)
    assert draw() == expected


def test_ranks_and_seeds_draw_differently():
    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (2**31 - 1, 7)):
        seed_everything(seed, rank)
        drawn.append(draw())
    assert all(one != other for index, one in enumerate(drawn) for other in drawn[:index])
    seed_everything(0, 0)
    assert draw() == drawn[0]
