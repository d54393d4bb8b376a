"""What the benchmarks make of what they measured; and that each part runs, at the smallest size."""

import statistics

import pytest
from support.scripts import loaded


@pytest.fixture
def bench():
    with loaded("bench_rounds"), loaded("bench_moe") as module:
        yield module


def test_speed_is_the_median_of_ratios_within_rounds():
    with loaded("bench_rounds") as rounds:
        seconds = {"a": [9.0, 1.0, 2.0, 6.0], "b": [1.0, 2.0, 2.0, 2.0]}
        assert rounds.speed_of(seconds, "b", "a", 3) == 1.0
        assert rounds.speed_of(seconds, "b", "a", 1) == 3.0


def test_rounds_run_every_row_and_begin_with_another():
    with loaded("bench_rounds") as rounds:
        calls = []
        steps = {name: lambda number, name=name: calls.append((number, name)) for name in "ab"}
        seconds = rounds.interleave(steps, warmup=1, rounds=2, clock="cpu")
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_ratio_that_fell_by_more_than_a_tenth_is_named(bench):
    recorded = {"bf16/smoe_train": 0.80, "fp32/smoe_train": 0.90, "not/measured": 1.0}
    assert bench.fallen({"bf16/smoe_train": 0.73, "fp32/smoe_train": 0.80}, recorded) == [
        "fp32/smoe_train: 0.800, recorded 0.900"
    ]


def test_a_falling_ratio_fails_and_recording_does_not(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDED", tmp_path / "recorded.json")
    rows = [bench.Row("bf16", "smoe_train", 1.0, 0.0, 0.9, None)]
    slower = [bench.Row("bf16", "smoe_train", 1.0, 0.0, 0.7, None)]
    assert bench.compare(rows, bench.parse([])) == 0  # nothing is recorded yet
    assert bench.compare(rows, bench.parse(["--record"])) == 0
    assert bench.compare(rows, bench.parse([])) == 0
    assert bench.compare(slower, bench.parse([])) == 1
    assert bench.compare(slower, bench.parse(["--threads", "2"])) == 0  # compared with the same threads alone


def test_goals_are_those_of_the_scenarios_that_ran(bench):
    scenario = next(one for one in bench.SCENARIOS if one.name == "bf16")
    steps = [3.0] * 10 + [1.0] * 51
    seconds = {name: [value * (index + 1) for value in steps] for index, name in enumerate(scenario.rows)}
    rows = bench.rows_of(scenario, seconds, 11)
    goals = bench.goals_of({"bf16": seconds}, rows, 11)
    assert goals["bf16_smoe_train_speed_of_dense"] == {"value": 0.25, "goal": 0.85}  # the fourth row
    assert goals["bf16_first_10_steps_to_steps_41_to_50"]["value"] == 3.0
    assert all(name.startswith("bf16_") for name in goals)


def test_linearity_is_1_on_a_line_and_less_beside_it(bench):
    assert bench.linearity({8: 10.0, 16: 12.0, 64: 24.0}) == pytest.approx(1.0)
    assert bench.linearity({8: 10.0, 16: 30.0, 64: 24.0}) < 0.5


def test_saving_is_relative_to_the_line_between_one_and_two_experts():
    with loaded("bench_rounds"), loaded("bench_step") as step:
        seconds = {"top_2": [100.0, 10.0, 10.0], "top_1": [1.0, 6.0, 6.0], "row": [5.0, 8.0, 8.4]}
        assert step.saving(seconds, "row", share=0.5, rounds=2) == pytest.approx(statistics.median([2.0, 1.6]) / 2.0)


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["smoe_train", "oracle", "deepspeed_autoep_experts", "mixtral_grouped", "dense"])
def test_every_kind_of_row_trains(name):
    import torch

    with loaded("bench_models") as models:
        shape = models.Shape(tokens=32, sequence_length=16, d_model=16, num_heads=2, num_layers=1, d_ff=16, experts=4)
        model = models.build(shape, name)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        models.stepper(model, shape, torch.float32)(0)
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) >= len(changed) - 1  # an expert may have got no token


@pytest.mark.compiler
def test_layers_of_peers_agree_with_ours():
    with loaded("bench_models") as models:
        shape = models.Shape(tokens=64, sequence_length=16, d_model=16, num_heads=2, num_layers=1, d_ff=16, experts=4)
        names = ["smoe_train", "module_list_loop", "deepspeed_autoep_experts", "mixtral_block_eager"]
        assert models.check_agreement(shape, names) < 1e-5
